"""Search configs of the CUDA linear kernels for the benchmark's layers and shapes, as `qcompile tune` does for an artifact.

python benchmarks/cuda_tune.py --prepare [--layers ... --shapes ...]     without a GPU: generate the sources
python benchmarks/cuda_tune.py --compile                                 only compile, one process per core
python benchmarks/cuda_tune.py --journal trials.jsonl --out tuned.json   measure; goes on where it was stopped
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cuda_gemm import LAYERS, SHAPES, layer_plan

from qcompile.codegen.kernels.cuda.plan import ROWS, Plan
from qcompile.codegen.tune.cuda import Batch, Search, batches
from qcompile.targets.cuda import TARGETS


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true", help="only write sources")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--layers", default="w4a16,w8a8,w4a8,w2a16")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--count", type=int, default=12, help="candidates per layer, shape and bucket")
    parser.add_argument("--workers", type=int, help="processes that compile; 0: another process does")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--out", type=Path, help="table to merge the fastest configs into")
    args = parser.parse_args()
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes.split(",")]
    search = Search(args.journal)
    known = search.known()
    work: list[Batch] = []
    for layer in args.layers.split(","):
        for n, k in shapes:
            problem = layer_plan(layer, n, k, args.arch, rows=(1,)).problem
            buckets = _buckets(layer, [int(r) for r in args.rows.split(",")])
            work += batches(problem, TARGETS[args.arch], buckets, args.count, known)
    print(sum(len(b.buckets) for b in work), "candidates in", len(work), "libraries", flush=True)
    if args.prepare or args.compile:
        make = Plan.source if args.prepare else Plan.library
        with ProcessPoolExecutor(args.workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(make, [b.plan for b in work]))
    else:
        search.run(work, start + args.seconds, args.workers)
    for key, trial in sorted(search.best().items()):
        chosen = " ".join(f"{a}={b}" for a, b in trial.config.items() if a not in ("dtype", "out"))
        print(f"{key}  {trial.seconds[0] * 1e6:8.2f} us  {trial.family} {chosen}")
    print(f"{time.monotonic() - start:.0f} s")
    if args.out:
        search.save(args.out)


def _buckets(layer: str, wanted: list[int]) -> list[int]:
    """Those whose kernels the layer's rows use."""
    used = {next((r for r in ROWS if r >= m), ROWS[-1]) for m in LAYERS[layer][2]}
    return [rows for rows in wanted if rows in used]


if __name__ == "__main__":
    main()
