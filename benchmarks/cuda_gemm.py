"""Low-bit linear layers on one CUDA device against cuBLAS, Marlin, gemlite, torch's int4 kernel and the copy bandwidth.

    python benchmarks/cuda_gemm.py --prepare            without a GPU: generate the sources of everything below
    python benchmarks/cuda_gemm.py [--out results.json] measure

Peers (`cuda_peers`) are timed the same way in the same process; see `qcompile.codegen.kernels.cuda.measure`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cuda_peers import PEERS

from qcompile.codegen.kernels.cuda import build
from qcompile.codegen.kernels.cuda.measure import calls, copy_bandwidth, measure, weight_sets
from qcompile.codegen.kernels.cuda.plan import ROWS, Plan
from qcompile.kernels import plan
from qcompile.targets.cuda import TARGETS

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]
"""(N, K)."""

LAYERS: dict[str, tuple[str, str, tuple[int, ...], tuple[str, ...]]] = {
    "w4a16": (
        "int4/g128",
        "none",
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024),
        ("fp16", "marlin", "gemlite", "int4pack"),
    ),
    "w2a16": ("int2/g128", "none", (1,), ()),
    "w3a16": ("int3/g128", "none", (1,), ()),
    "w8a16": ("int8", "none", (1, 16), ()),
    "w8a8": ("int8", "int8/token", (1, 16, 32, 64, 128, 512, 4096), ("int_mm", "int_mm_scaled")),
    "w4a8": ("int4", "int8/token", (1, 16, 32, 64, 128), ()),
    "nf4": ("nf4/g64", "none", (1, 16, 256), ()),
    "mxfp4": ("mxfp4", "none", (1, 16, 256), ()),
    "dual4": ("dual4/g128", "int8/token", (1, 16, 128), ()),
    "fp8": ("fp8", "e4m3/token", (16, 128, 512, 4096), ("scaled_mm",)),
    "w4fp8": ("int4", "e4m3/token", (16, 128, 512), ()),
    "w6a6": ("int6", "int6/token", (1, 8, 16, 32, 64), ()),
}
"""Weight format, activation format, numbers of rows, peers."""


def buckets(counts: Sequence[int]) -> list[int]:
    """Those whose kernels these numbers of rows use."""
    return sorted({next((r for r in ROWS if r >= m), ROWS[-1]) for m in counts})


def layer_plan(layer: str, n: int, k: int, arch: str, rows: Sequence[int] = ()) -> Plan:
    """The kernels of a layer of `LAYERS`, by default those for its numbers of rows."""
    weight, activation, counts, _ = LAYERS[layer]
    return plan(k, n, weight, activation, torch.float16, arch, rows=rows or buckets(counts))


def peer(name: str, m: int, n: int, k: int) -> float | None:
    """A peer's time, or None with a note if it cannot run."""
    torch.cuda.empty_cache()
    try:
        functions = PEERS[name](m, n, k)
        return measure(functions) if functions else None
    except Exception as error:
        print("   ", name, m, n, k, (str(error).splitlines() or [repr(error)])[0][:150])
        return None


def make_all(make: Callable[[Plan], Path], plans: list[Plan]) -> list[Path]:
    """Sources or libraries, a process per core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(make, plans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true", help="only write sources")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--rows", help="only these of a layer's numbers of rows")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--out")
    args = parser.parse_args()
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes.split(",")]
    layers = args.layers.split(",")
    wanted = [int(m) for m in args.rows.split(",")] if args.rows else []
    counts = {layer: [m for m in LAYERS[layer][2] if not wanted or m in wanted] for layer in layers}
    plans = {
        (layer, n, k): layer_plan(layer, n, k, args.arch, buckets(counts[layer])) for layer in layers for n, k in shapes
    }
    if args.prepare:
        print(*make_all(Plan.source, list(plans.values())), sep="\n")
        return
    make_all(Plan.library, list(plans.values()))
    if args.compile:
        return
    print("device", torch.cuda.get_device_name(), "torch", torch.__version__)
    peak = copy_bandwidth()
    print(f"copy bandwidth {peak / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for (layer, n, k), p in plans.items():
        module = build.load(p.library())
        torch.cuda.empty_cache()  # or weights lie scattered over what the layers before have freed, up to 15 % slower
        sets, size = weight_sets(p)
        for m in counts[layer]:
            index = next((i for i, e in enumerate(p.entries) if e.rows >= m), len(p.entries) - 1)
            own = measure(calls(p, index, m, sets, module[p.entries[index].symbol]))
            row: dict[str, Any] = {"layer": layer, "n": n, "k": k, "m": m, "own": own, "bandwidth": size / own / peak}
            row |= {name: peer(name, m, n, k) for name in LAYERS[layer][3] if name in args.peers.split(",")}
            rows.append(row)
            shown = "  ".join(f"{key} {v * 1e6:8.2f}" for key, v in row.items() if key in PEERS and v)
            print(
                f"{layer} {n:6d}x{k:<6d} m {m:5d}  own {own * 1e6:8.2f} us ({row['bandwidth']:4.0%})  {shown}",
                flush=True,
            )
    if args.out:
        results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": peak, "rows": rows}
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
