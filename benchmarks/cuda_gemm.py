"""Low-bit linear layers on one CUDA device against cuBLAS, torch's int4 kernel and the memory's copy bandwidth.

    python benchmarks/cuda_gemm.py --prepare            without a GPU: generate the sources of everything below
    python benchmarks/cuda_gemm.py [--out results.json] measure
    python benchmarks/cuda_gemm.py --prepare --tune, then --tune: measure candidate configs, write tuned.json

Every figure is the median over replays of a CUDA graph that calls one kernel on many copies of the weights in turn,
together larger than the second-level cache, divided by the number of calls. Times of candidates and peers are taken the
same way in the same process. Weights are random bits: values do not matter for time, the GPU tests check results.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from qcompile.codegen.kernels.cuda import build, tuned
from qcompile.kernels import ROWS, Plan, plan
from qcompile.targets.cuda import TARGETS

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]
"""(N, K)."""

LAYERS = {
    "w4a16": ("int4/g128", "none", (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)),
    "w2a16": ("int2/g128", "none", (1,)),
    "w3a16": ("int3/g128", "none", (1,)),
    "w8a16": ("int8", "none", (1, 16)),
    "w8a8": ("int8", "int8/token", (1, 16, 32, 64, 128, 512, 4096)),
    "w4a8": ("int4", "int8/token", (1, 16, 32, 64, 128)),
}
"""Weight format, activation format, numbers of rows."""

CACHE = 256 << 20
"""Copies of the weights add up to at least this many bytes."""


def layer_plan(layer: str, n: int, k: int, arch: str, configs: Any = None) -> Plan:
    """The kernels of a layer of `LAYERS`."""
    weight, activation, _ = LAYERS[layer]
    return plan(k, n, weight, activation, torch.float16, arch, configs=configs)


def random_arrays(p: Plan) -> list[torch.Tensor]:
    """Packed arrays of the right sizes with random codes."""
    s = p.family.shape(p.problem, p.configs[0])
    arrays = [
        torch.randint(0, 256, (s.tiles * s.blocks * plane.block_bytes,), dtype=torch.uint8, device="cuda")
        for plane in s.layout.planes
    ]
    if s.meta_bytes:
        size = s.tiles * s.meta_groups * 8 * s.meta_bytes
        arrays.append(torch.rand(size // 2, device="cuda").half().view(torch.uint8))
    return [*arrays, torch.rand(p.problem.n, device="cuda") * 0.01]


def calls(p: Plan, m: int, index: int | None = None) -> tuple[list[Any], int]:
    """Closures that run the layer on ``m`` rows of distinct weights each, and the bytes of one set of weights."""
    module = build.load(p.library())
    if index is None:
        index = next((i for i, rows in enumerate(ROWS) if rows >= m), len(ROWS) - 1)
    config = p.configs[index]
    s = p.family.shape(p.problem, config)
    function = module[f"rows{8 * config['mt']}"]
    if s.integer:
        x = [torch.randint(-127, 128, (m, s.x_width), dtype=torch.int8, device="cuda"), torch.rand(m, device="cuda")]
    else:
        x = [torch.randn(m, s.x_width, device="cuda", dtype=torch.float16)]
    elements, counters = p.family.scratch(p.problem, config, m)
    partial = torch.empty(elements, device="cuda")
    arrived = torch.zeros(counters, dtype=torch.int32, device="cuda")
    out = torch.empty(m, p.problem.n, device="cuda", dtype=torch.float16)
    first = random_arrays(p)
    size = sum(a.numel() * a.element_size() for a in first)
    sets = [first] + [[a.clone() for a in first] for _ in range(-(-CACHE // size))]
    return [lambda w=w: function(*x, *w, partial, arrived, out) for w in sets], size


def measure(functions: list[Any], replays: int = 9) -> float:
    """Median seconds per call."""
    for f in functions[:2]:
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 20 // len(functions))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for f in functions:
                f()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[replays // 2] * 1e-3 / (rounds * len(functions))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy; not in a graph, whose copies are slower."""
    a = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(10)]
    b.copy_(a)
    for event in events:
        event.record()
        b.copy_(a)
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in pairwise(events))
    return 2 * a.numel() / (times[len(times) // 2] * 1e-3)


def rotated(make: Any, size: int) -> list[Any]:
    """``make()`` as often as it takes to leave the cache."""
    return [make() for _ in range(-(-CACHE // size) + 1)]


def peer_fp16(m: int, n: int, k: int) -> float:
    """cuBLAS through torch.mm."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    ws = rotated(lambda: torch.randn(n, k, device="cuda", dtype=torch.float16), 2 * n * k)
    return measure([lambda w=w: torch.mm(x, w.t()) for w in ws])


def peer_int_mm(m: int, n: int, k: int, scaled: bool) -> float | None:
    """torch._int_mm (cuBLASLt), which takes more than 16 rows; ``scaled`` adds separate scaling to float16."""
    if m <= 16:
        return None
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    ws = rotated(lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"), n * k)
    a, b = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
    if scaled:
        return measure([lambda w=w: (torch._int_mm(x, w.t()) * (a * b)).half() for w in ws])
    return measure([lambda w=w: torch._int_mm(x, w.t()) for w in ws])


def peer_int4pack(m: int, n: int, k: int) -> float | None:
    """torch._weight_int4pack_mm (tinygemm), bfloat16, groups of 128."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)

    def make() -> torch.Tensor:
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        return torch._convert_weight_to_int4pack(raw, 8)

    ws = rotated(make, n * k // 2)
    return measure([lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in ws])


def attempt(f: Any, *args: Any) -> float | None:
    """A peer's time, or None with a note if it cannot run."""
    try:
        return f(*args)
    except Exception as error:
        print("   ", f.__name__, args, str(error).splitlines()[0][:150])
        return None


def compile_all(plans: list[Plan]) -> None:
    """Compile libraries, one nvcc per core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda p: p.library(), plans))


def candidates(layer: str, n: int, k: int, rows: int, arch: str) -> list[dict[str, Any]]:
    """Configs worth measuring: divisions of the block that left a first, wider search of W4A16 among the best."""
    base = layer_plan(layer, n, k, arch)
    known = replace(base.problem, m=rows)
    kind = "int8" if base.problem.activation.bits else "float16"
    ranked = [c for c in base.family.configs(known, base.target) if c["dtype"] == kind]
    found = []
    for tn, nw, kw, stages in DIVISIONS:
        match = [c for c in ranked if (c["tn"], c["nw"], c["kw"], c["stages"]) == (tn, nw, kw, stages)]
        found += [{**c, "out": "float16"} for c in match[:1]]
    return found


DIVISIONS = [(1, 1, 8, 3), (1, 1, 8, 4), (1, 1, 4, 4), (2, 1, 8, 4), (2, 1, 4, 4), (1, 4, 1, 4), (1, 8, 1, 3)]
"""Channel tiles of a warp, warps along N and K, stages."""


TUNED = {"w4a16": (8, 16, 32, 64), "w2a16": (8,), "w8a8": (8, 16, 64), "w4a8": (16, 64)}


def tuning_plans(
    arch: str, layers: list[str], shapes: list[tuple[int, int]]
) -> list[tuple[str, int, int, int, dict[str, Any], Plan]]:
    """One library per candidate."""
    found = []
    for layer in layers:
        for n, k in shapes:
            for rows in TUNED[layer]:
                for c in candidates(layer, n, k, rows, arch):
                    p = replace(layer_plan(layer, n, k, arch), configs=(c,))
                    found.append((layer, n, k, rows, c, p))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--out")
    args = parser.parse_args()
    layers = [name for name in args.layers.split(",") if not args.tune or name in TUNED]
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes.split(",")]
    if args.tune:
        tune(args, tuning_plans(args.arch, layers, shapes))
        return
    plans = {(layer, n, k): layer_plan(layer, n, k, args.arch) for layer in layers for n, k in shapes}
    if args.prepare:
        for key, p in plans.items():
            print(*key, p.source(), flush=True)
        return
    compile_all(list(plans.values()))
    print("device", torch.cuda.get_device_name(), "torch", torch.__version__)
    peak = copy_bandwidth()
    print(f"copy bandwidth {peak / 1e12:.2f} TB/s")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy": peak,
        "rows": [],
    }
    for n, k in shapes:
        for layer in layers:
            for m in LAYERS[layer][2]:
                functions, size = calls(plans[layer, n, k], m)
                row: dict[str, Any] = {"layer": layer, "n": n, "k": k, "m": m, "own": measure(functions)}
                del functions
                if layer == "w4a16":
                    row["fp16"] = attempt(peer_fp16, m, n, k)
                    row["int4pack"] = attempt(peer_int4pack, m, n, k) if m <= 128 else None
                if layer == "w8a8":
                    row["int_mm"] = attempt(peer_int_mm, m, n, k, False)
                    row["int_mm_scaled"] = attempt(peer_int_mm, m, n, k, True)
                row["bandwidth"] = size / row["own"] / peak
                results["rows"].append(row)
                shown = "  ".join(f"{key} {v * 1e6:8.2f}" for key, v in row.items() if key in PEERS and v)
                print(
                    f"{layer} {n:6d}x{k:<6d} m {m:5d}  own {row['own'] * 1e6:8.2f} us ({row['bandwidth']:4.0%})  {shown}",
                    flush=True,
                )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


PEERS = ("fp16", "int4pack", "int_mm", "int_mm_scaled")


def tune(args: Any, plans: list[tuple[str, int, int, int, dict[str, Any], Plan]]) -> None:
    """Measure every candidate, keep the best per problem in tuned.json."""
    if args.prepare:
        for *_, p in plans:
            p.source()
        print(len(plans), "candidates")
        return
    compile_all([p for *_, p in plans])
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    log = []
    for layer, n, k, rows, c, p in plans:
        try:
            functions, _ = calls(p, rows if rows > 8 else 1, 0)
            time = measure(functions, 5)
        except Exception as error:
            print("failed", layer, n, k, c, str(error)[:200])
            continue
        kind = "int8" if p.problem.activation.bits else "float16"
        name = tuned.name(p.family, p.problem, p.target, rows, kind)
        log.append((name, time * 1e6, c))
        if name not in best or time < best[name][0]:
            best[name] = time, c
    for name, time, c in sorted(log, key=lambda e: (e[0], e[1])):
        print(
            f"{name}  {time:8.2f} us  tn {c['tn']} nw {c['nw']} kw {c['kw']} split {c['split']} stages {c['stages']} ahead {c['ahead']}"
        )
    if args.out:
        merged = {**tuned.table(), **{name: c for name, (_, c) in best.items()}}
        with open(args.out, "w") as file:
            json.dump(dict(sorted(merged.items())), file, indent=1)


if __name__ == "__main__":
    main()
