"""Linear kernels on this machine beside ONNX Runtime, llama.cpp and a pure read, shape by shape, in one table.

    TVM_NUM_THREADS=2 python benchmarks/cpu_gemm.py                                all of it: hours
    python benchmarks/cpu_gemm.py --shapes 4096x4096 --rows 1 --from memory        K x N, one row, from memory
    python benchmarks/cpu_gemm.py --cliff --weights int2/g128                      throughput over N = 64 .. 512

`ours` is the per-token quantizer and the kernel that `select` chooses, as the peers quantize too; `kernel` is the latter
alone. Peers: ``MatMulNBits`` with accuracy level 4 (``nbits``) and its look-up kernel (``ort-lut``), ONNX Runtime's exact 8-bit
products (``u8s8`` without, ``dynamic`` with quantizer), ggml's types by their names, ``read``: the bytes of our packed weights.
llama.cpp comes with the extra ``peers``, or from ``--ggml FOLDER``; a library of your own with ``--peer NAME=PATH``.

A call computes several products with weights of their own: `cache` has a few megabytes of them, `memory` several times the
last-level cache. Contenders take turns in three blocks, in one process; a figure is the lowest of the three medians, in
microseconds per product, and in brackets how many times ours it is. One thread is timed by its own CPU clock, which other
processes disturb least, several by the wall clock.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable

os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
import tvm
from peers import ggml, library, ort, read

from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.tune.database import shipped
from qcompile.codegen.tune.measure import random_weight
from qcompile.formats import Format, parse_activation, parse_format
from qcompile.targets import x86
from qcompile.targets.target import Target

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "3200x8640", "1536x384", "2048x5632"]
WEIGHTS = ["int1/g128", "int2/g128", "int3/g128", "int4/g128", "int8"]
GGML = {1: [], 2: ["Q2_K", "TQ2_0"], 3: ["Q3_K"], 4: ["Q4_0", "Q4_K"], 8: ["Q8_0"]}
CACHE, MEMORY = 4 << 20, 128 << 20
Call = Callable[[], None]


class Contender:
    """Our kernel for one problem, with weights for ``copies`` products."""

    def __init__(self, problem: LinearProblem, target: Target, m: int, copies: int | None, bytes_wanted: int) -> None:
        self.choice = select(problem, target, shipped(target))
        family, config = self.choice.family, self.choice.config
        kernel = tvm.compile(family.build(problem, config, target, "gemm"), target=target.tvm())["gemm"]
        packed = family.pack(problem, config, random_weight(problem))
        self.size = sum(array.nbytes for array in packed.values())
        self.copies = copies or max(2, -(-bytes_wanted // self.size))
        weights = [[tvm.runtime.tensor(a) for a in packed.values()] for _ in range(self.copies)]
        rng = np.random.default_rng(1)
        rows = tvm.runtime.tensor(rng.normal(size=(m, problem.k)).astype(np.float32))
        codes, scale = tvm.runtime.empty((m, problem.k), "uint8"), tvm.runtime.empty((m,), "float32")
        out = tvm.runtime.empty((m, problem.n), "float32")
        quantizer = Rowwise(problem.k, f32_output=False, quantize="token").build(target, "quantize")
        quantize = tvm.compile(tvm.IRModule({"quantize": quantizer}), target=target.tvm())["quantize"]
        quantize(rows, codes, scale)

        def alone() -> None:
            for weight in weights:
                kernel(codes, scale, *weight, out)

        def both() -> None:
            for weight in weights:
                quantize(rows, codes, scale)
                kernel(codes, scale, *weight, out)

        self.calls: dict[str, Call] = {"ours": both, "kernel": alone}


def peers(fmt: Format, k: int, n: int, m: int, copies: int, size: int, threads: int, target: Target, args) -> dict:
    """Calls by name, None for peers that cannot do the product."""
    found: dict[str, Call | None] = {}
    group = fmt.group or k
    if fmt.bits in (2, 4):
        able = fmt.group and k % group == 0
        found[f"nbits{fmt.bits}"] = ort.nbits(k, n, m, fmt.bits, group, copies, threads) if able else None
        if fmt.bits == 2 and m == 1:
            found["ort-lut"] = ort.nbits(k, n, m, 2, group, copies, threads, lut=True) if able else None
    if fmt.bits == 8:
        found["u8s8"] = ort.integers(k, n, m, copies, threads, quantize=False)
        found["dynamic"] = ort.integers(k, n, m, copies, threads, quantize=True)
    for kind in GGML.get(fmt.bits, []):
        if args.library is None or k % ggml.BLOCK[kind]:
            found[kind] = None
            continue
        product = ggml.Product(args.library, kind, k, n, m, copies, repack=True)
        args.opened.append(product)
        found[kind] = product.caller(threads)
    for text in args.peer:
        name, _, path = text.partition("=")
        found[name] = library.product(path, k, n, m, fmt.bits, fmt.group, copies, threads)
    if m == 1:
        found["read"] = read.reader(size, copies, threads, target)
    return found


def measure(calls: dict[str, Call], copies: int, seconds: float, threads: int) -> dict[str, float]:
    """Microseconds per product. Blocks alternate, with a pause in which the other's idle threads fall asleep."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            time.sleep(0.03)
            call()
            end = time.perf_counter() + seconds / 3 / len(calls)
            samples = []
            while len(samples) < 3 or time.perf_counter() < end:
                start = clock()
                call()
                samples.append(clock() - start)
            medians[name].append(float(np.median(samples)))
    return {name: 1e6 * min(values) / copies for name, values in medians.items()}


def line(fmt: str, k: int, n: int, m: int, threads: int, where: str, args) -> None:
    """One line of the table."""
    target = x86.host(cores=threads) if args.target == "native" else x86.named(args.target, threads)
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    problem = LinearProblem(k, n, parse_format(fmt), parse_activation("int8/token"), threads=threads)
    own = Contender(problem, target, m, None, CACHE if where == "cache" else MEMORY)
    others = peers(problem.weight, k, n, m, own.copies, own.size, threads, target, args)
    calls = own.calls | {name: call for name, call in others.items() if call is not None}
    us = measure(calls, own.copies, args.seconds, threads)
    cells = [f"{us['ours']:9.1f}", f"{us['kernel']:9.1f}"]
    cells += [f"{name} " + (f"{us[name]:.1f} ({us[name] / us['ours']:.2f}x)" if name in us else "-") for name in others]
    head = f"{k:6}x{n:<6}{fmt:>10} {m:4} {threads:3} {where:>6} {own.choice.family.name:>12}"
    print(head, *cells, sep="  ", flush=True)
    for product in args.opened:
        product.close()
    args.opened.clear()
    del own, others, calls
    gc.collect()


def cliff(fmt: str, k: int, m: int, args) -> None:
    """Throughput over N: no width may fall far behind its neighbours."""
    target = x86.host(cores=1)
    tvm.get_global_func("runtime.config_threadpool")(1, 1)
    widths, rates = list(range(64, 513, 32)), []
    for n in widths:
        problem = LinearProblem(k, n, parse_format(fmt), parse_activation("int8/token"))
        own = Contender(problem, target, m, 4, CACHE)
        us = measure({"kernel": own.calls["kernel"]}, own.copies, args.seconds, 1)["kernel"]
        rates.append(m * k * n / us / 1e3)
    worst = min(b / ((a + c) / 2) for a, b, c in zip(rates, rates[1:], rates[2:]))
    print(f"{fmt}, K = {k}, M = {m}: " + " ".join(f"{n}:{rate:.0f}" for n, rate in zip(widths, rates)), end="")
    print(f" G multiply-adds/s; lowest share of its neighbours {worst:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--weights", nargs="+", default=WEIGHTS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target", default="native")
    parser.add_argument("--from", dest="where", nargs="+", default=["cache", "memory"], choices=["cache", "memory"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    parser.add_argument("--ggml", metavar="FOLDER", help="holds libggml-base.so and libggml-cpu.so")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="see peers/library.py")
    parser.add_argument("--cliff", action="store_true", help="throughput over N instead of the table")
    args = parser.parse_args()
    args.opened = []
    try:
        args.library = ggml.Ggml(args.ggml)
    except FileNotFoundError as error:
        args.library = None
        print(f"llama.cpp: {error}")
    for fmt in args.weights:
        if args.cliff:
            for m in args.rows:
                cliff(fmt, int(args.shapes[0].partition("x")[0]), m, args)
            continue
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            for m in args.rows:
                for where in args.where if m == 1 else args.where[:1]:
                    for threads in args.threads:
                        line(fmt, k, n, m, threads, where, args)


if __name__ == "__main__":
    main()
