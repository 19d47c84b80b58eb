"""Measure candidate configs of the CUDA linear kernels and keep the best in tuned.json.

    python benchmarks/cuda_tune.py --prepare [--layers ... --shapes ...]     without a GPU: generate the sources
    python benchmarks/cuda_tune.py --out tuned.json [...]                    measure, merge with what is known

Candidates are the best configs by the cost model, one per division of the work (tiles and warps), the pipeline's depth
varied for the first ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from cuda_gemm import LAYERS, SHAPES, calls, layer_plan, measure, weight_sets

from qcompile.codegen.kernels.cuda import FAMILIES, build, tuned
from qcompile.codegen.kernels.cuda.plan import ROWS, Entry, Plan, family
from qcompile.targets.cuda import TARGETS

MEASURED = {1: 1, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256, 512: 1024}
"""Rows a config for so many rows is measured with."""

DIVISION = ("rows", "tn", "nw", "kw", "raw", "wg", "mt", "split")


def candidates(p: Plan, rows: int, count: int) -> list[Entry]:
    """Up to ``count`` entries, of all families that take the problem."""
    dtype = "int8" if p.problem.activation.bits else "float16"
    m = MEASURED[rows]
    known = replace(p.problem, m=m)
    ranked: list[tuple[float, str, dict[str, Any]]] = []
    for name in (cls.name for cls in FAMILIES):
        kind = family(name)
        if not kind.supports(p.problem, p.target):
            continue
        if ("stream" in name and rows > 16) or ("tiled" in name and rows < 8):
            continue
        ranked += [
            (kind.cost(known, c, p.target, m), name, c) for c in kind.configs(known, p.target) if c["dtype"] == dtype
        ]
        if "stream" in name and dtype == "float16" and rows <= 8:
            ranked += [(1.02 * cost, n, {**c, "raw": not c["raw"]}) for cost, n, c in ranked if n == name]
    ranked.sort(key=lambda entry: entry[0])
    divisions: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for _, name, config in ranked:
        divisions.setdefault((name, *(config.get(key) for key in DIVISION)), []).append((name, config))
    first = [same[0] for same in divisions.values()][: count - count // 4]
    more = [entry for same in divisions.values() for entry in same[1:2]][: count // 4]
    for _, name, config in ranked:
        if all(config.get(key) in values for key, values in GOOD.items()) and (name, config) not in first + more:
            more.append((name, config))
    return [Entry(rows, name, {**config, "out": "float16"}) for name, config in first + more]


GOOD = {"tn": (1, 2), "nw": (1,), "kw": (8,), "split": (1,), "stages": (4, 6), "raw": (True, False)}
"""Streaming configs that were among the best of earlier, wider searches; always measured."""


def libraries(layer: str, n: int, k: int, arch: str, buckets: list[int], count: int) -> list[Plan]:
    """Plans that hold the candidates, several to a library."""
    base = layer_plan(layer, n, k, arch, rows=(1,))
    found = [entry for rows in buckets for entry in candidates(base, rows, count)]
    entries = [Entry(i, e.family, {**e.config, "bucket": e.rows}) for i, e in enumerate(found)]
    size = 8
    return [replace(base, entries=tuple(entries[i : i + size])) for i in range(0, len(entries), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true", help="only write sources")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--layers", default="w4a16,w2a16,w8a8,w4a8")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--out")
    parser.add_argument("--log")
    args = parser.parse_args()
    buckets = [int(r) for r in args.rows.split(",")]
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes.split(",")]
    jobs = {
        (layer, n, k): libraries(layer, n, k, args.arch, _buckets(layer, buckets), args.count)
        for layer in args.layers.split(",")
        for n, k in shapes
    }
    if args.prepare:
        for key, plans in jobs.items():
            for p in plans:
                p.source()
            print(*key, sum(len(p.entries) for p in plans), "candidates", flush=True)
        return
    start = time.time()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(Plan.library, [p for plans in jobs.values() for p in plans]))
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    if args.compile:
        return
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    log: list[tuple[str, float, dict[str, Any]]] = []
    for (layer, n, k), plans in jobs.items():
        sets, _ = weight_sets(plans[0])
        for p in plans:
            module = build.load(p.library())
            for index, entry in enumerate(p.entries):
                config = dict(entry.config)
                rows = config.pop("bucket")
                try:
                    took = measure(calls(p, index, MEASURED[rows], sets, module[entry.symbol]), 5)
                except Exception as error:
                    print("failed", layer, n, k, rows, entry, str(error)[:200])
                    continue
                kind = "int8" if p.problem.activation.bits else "float16"
                key = tuned.name(p.problem, p.target, rows, kind)
                log.append((key, took * 1e6, {"family": entry.family, **config}))
                if key not in best or took < best[key][0]:
                    best[key] = took, {"family": entry.family, **config}
    for key, (took, config) in sorted(best.items()):
        print(
            f"{key}  {took * 1e6:8.2f} us  {' '.join(f'{a}={b}' for a, b in config.items() if a not in ('dtype', 'out'))}"
        )
    print(f"measured in {time.time() - start:.0f} s")
    if args.log:
        with open(args.log, "w") as file:
            for key, took, config in sorted(log, key=lambda e: (e[0], e[1])):
                print(key, f"{took:.2f}", json.dumps(config), file=file)
    if args.out:
        merged = {**tuned.table(), **{key: config for key, (_, config) in best.items()}}
        with open(args.out, "w") as file:
            json.dump(dict(sorted(merged.items())), file, indent=1)


def _buckets(layer: str, wanted: list[int]) -> list[int]:
    """Those whose kernels the layer's rows use."""
    used = {next((r for r in ROWS if r >= m), ROWS[-1]) for m in LAYERS[layer][2]}
    return [rows for rows in wanted if rows in used]


if __name__ == "__main__":
    main()
