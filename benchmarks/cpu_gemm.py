"""Linear kernels on this machine beside ONNX Runtime, llama.cpp and a pure read, shape by shape, in one table.

    TVM_NUM_THREADS=2 python benchmarks/cpu_gemm.py --out figures.jsonl            all of it: hours
    python benchmarks/cpu_gemm.py --shapes 4096x4096 --rows 1 --from memory        K x N, one row, from memory
    python benchmarks/cpu_gemm.py --out figures.jsonl --markdown                   tables of what was measured
    python benchmarks/cpu_gemm.py --cliff --weights int2/g128                      throughput over N = 64 .. 512

With ``--out`` every line is kept as it is measured, and one that is there already is not measured again.

`ours` is the per-token quantizer and the kernel that `select` chooses, as the peers quantize too; `kernel` is the latter
alone. Peers: ``MatMulNBits`` with accuracy level 4 (``nbits``) and its look-up kernel (``ort-lut``), ONNX Runtime's exact 8-bit
products (``u8s8`` without, ``dynamic`` with quantizer) and its product of ``float32`` weights (for tables and small
floats), ggml's types by their names, ``read``: the bytes of our packed weights, ``read4``: at four places in turn.
llama.cpp comes with the extra ``peers``, or from ``--ggml FOLDER``; a library of your own with ``--peer NAME=PATH``.

A call computes several products with weights of their own, ours from C if there is one thread: `cache` has a few megabytes of
them, `memory` several times the last-level cache. Contenders take turns in five blocks, in one process; a figure is the lowest of the five medians, in
microseconds per product, and in brackets how many times ours it is. One thread is timed by its own CPU clock, which other
processes disturb least, several by the wall clock. From 128 rows on a call is one product.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
import tvm
from c_products import CProducts
from peers import ggml, library, ort, read

from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.tune.database import database_for
from qcompile.codegen.tune.measure import random_weight
from qcompile.formats import Format, parse_activation, parse_format
from qcompile.formats.levels import LevelFormat
from qcompile.runtime import aligned
from qcompile.targets import x86
from qcompile.targets.target import Target

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "3200x8640", "1536x384", "2048x5632"]
WEIGHTS = ["int1/g128", "int2/g128", "int3/g128", "int4/g128", "int8", "q4_k", "nf4/g64"]
GGML = {"int2": ["Q2_K", "TQ2_0"], "int3": ["Q3_K"], "int4": ["Q4_0", "Q4_K"], "int8": ["Q8_0"],
        "q4_k": ["Q4_K"], "nf4": ["Q4_K"]}  # fmt: skip
CACHE, MEMORY = 4 << 20, 128 << 20
MANY = 128
"""Rows from which on a call is one product."""

BLOCKS = 5
"""Turns of a contender."""

Call = Callable[[], None]


@dataclass(frozen=True)
class Line:
    """One line of the table: ``weights`` of shape ``(k, n)``, ``rows``, threads, and where weights come from."""

    weights: str
    k: int
    n: int
    rows: int
    threads: int
    where: str


@functools.lru_cache(maxsize=1)
def compiled(problem: LinearProblem, target: Target) -> tuple:
    """The choice of `select`, its kernel, the quantizer, and packed weights: the same for any number of rows."""
    choice = select(problem, target, database_for(target))
    family, config = choice.family, choice.config
    quantizer = Rowwise(problem.k, f32_output=False, quantize="token").build(target, "quantize")
    functions = {"quantize": quantizer, "gemm": family.build(problem, config, target, "gemm")}
    packed = family.pack(problem, config, random_weight(problem))
    if problem.threads == 1:
        return choice, CProducts(functions, target), packed
    return choice, tvm.compile(tvm.IRModule(functions), target=target.tvm()), packed


class Contender:
    """Our kernel for one problem, with weights for ``copies`` products."""

    calls: dict[str, Call]

    def __init__(self, problem: LinearProblem, target: Target, m: int, copies: int | None, bytes_wanted: int) -> None:
        self.choice, library, packed = compiled(problem, target)
        self.size = sum(array.nbytes for array in packed.values())
        self.copies = copies or -(-bytes_wanted // self.size)
        x = np.random.default_rng(1).normal(size=(m, problem.k)).astype(np.float32)
        if isinstance(library, CProducts):
            own = [[aligned(a.copy()) for a in packed.values()] for _ in range(self.copies)]
            self.calls = library.calls(aligned(x), own, problem.n)
            return
        quantize, kernel = library["quantize"], library["gemm"]
        weights = [[tvm.runtime.tensor(a) for a in packed.values()] for _ in range(self.copies)]
        rows = tvm.runtime.tensor(x)
        codes, scale = tvm.runtime.empty((m, problem.k), "uint8"), tvm.runtime.empty((m,), "float32")
        out = tvm.runtime.empty((m, problem.n), "float32")
        quantize(rows, codes, scale)

        def alone() -> None:
            for weight in weights:
                kernel(codes, scale, *weight, out)

        def both() -> None:
            for weight in weights:
                quantize(rows, codes, scale)
                kernel(codes, scale, *weight, out)

        self.calls = {"ours": both, "kernel": alone}


def peers(fmt: Format, k: int, n: int, m: int, copies: int, size: int, threads: int, target: Target, args) -> dict:
    """Calls by name, None for peers that cannot do the product."""
    found: dict[str, Call | None] = {}
    name, group = str(fmt).partition("/")[0], fmt.group or k
    if name in ("int2", "int4"):
        able = fmt.group and k % group == 0
        found[f"nbits{fmt.bits}"] = ort.nbits(k, n, m, fmt.bits, group, copies, threads) if able else None
        if fmt.bits == 2 and m == 1:
            found["ort-lut"] = ort.nbits(k, n, m, 2, group, copies, threads, lut=True) if able else None
    if name == "int8":
        found["u8s8"] = ort.integers(k, n, m, copies, threads, quantize=False)
        found["dynamic"] = ort.integers(k, n, m, copies, threads, quantize=True)
    if isinstance(fmt, LevelFormat):
        found["float32"] = ort.floats(k, n, m, copies, threads)
    for kind in GGML.get(name, []):
        if args.library is None or k % ggml.BLOCK[kind]:
            found[kind] = None
            continue
        product = ggml.Product(args.library, kind, k, n, m, copies, repack=True)
        args.opened.append(product)
        found[kind] = product.caller(threads)
    for text in args.peer:
        peer, _, path = text.partition("=")
        found[peer] = library.product(path, k, n, m, fmt.bits, fmt.group, copies, threads)
    if m == 1:
        found["read"] = read.reader(size, copies, threads, target)
        found["read4"] = read.reader(size, copies, threads, target, streams=4)
    return found


def measure(calls: dict[str, Call], copies: int, seconds: float, threads: int) -> dict[str, float]:
    """Microseconds per product. Blocks alternate, with a pause in which the other's idle threads fall asleep."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BLOCKS):
        for name, call in calls.items():
            time.sleep(0.03)
            start, end = clock(), time.perf_counter() + seconds / BLOCKS / len(calls)
            call()
            samples = [clock() - start] if time.perf_counter() > end else []  # a slow one needs no other to warm up
            while not samples or (time.perf_counter() < end or 1 < len(samples) < 3):
                start = clock()
                call()
                samples.append(clock() - start)
            medians[name].append(float(np.median(samples)))
    return {name: 1e6 * min(values) / copies for name, values in medians.items()}


class Prepared:
    """Everything a line needs, ready to be measured."""

    def __init__(self, line: Line, args) -> None:
        self.line, self.args = line, args
        target = x86.host(cores=line.threads) if args.target == "native" else x86.named(args.target, line.threads)
        tvm.get_global_func("runtime.config_threadpool")(1, line.threads)
        problem = LinearProblem(
            line.k, line.n, parse_format(line.weights), parse_activation("int8/token"), threads=line.threads
        )
        few = 1 if line.rows >= MANY else None
        own = Contender(problem, target, line.rows, few, CACHE if line.where == "cache" else MEMORY)
        self.copies, self.family = own.copies, own.choice.family.name
        args.opened = self.opened = []
        found = peers(problem.weight, line.k, line.n, line.rows, own.copies, own.size, line.threads, target, args)
        self.missing = [name for name, call in found.items() if call is None]
        self.calls = own.calls | {name: call for name, call in found.items() if call is not None}

    def run(self) -> dict:
        """The line and its figures."""
        tvm.get_global_func("runtime.config_threadpool")(1, self.line.threads)
        us = measure(self.calls, self.copies, self.args.seconds, self.line.threads)
        return asdict(self.line) | {"family": self.family, "us": us, "missing": self.missing}

    def close(self) -> None:
        """Free what peers hold."""
        for product in self.opened:
            product.close()
        self.calls.clear()
        gc.collect()


def text(row: dict) -> str:
    """A measured line as it is printed."""
    us = row["us"]
    cells = [f"{us['ours']:9.1f}", f"{us['kernel']:9.1f}"]
    cells += [f"{n} {t:.1f} ({t / us['ours']:.2f}x)" for n, t in us.items() if n not in ("ours", "kernel")]
    cells += [f"{name} -" for name in row["missing"]]
    head = f"{row['k']:6}x{row['n']:<6}{row['weights']:>10} {row['rows']:4} {row['threads']:3} {row['where']:>6}"
    return "  ".join([f"{head} {row['family']:>12}", *cells])


def markdown(rows: list[dict]) -> str:
    """One table for each format of weights, number of threads and source: microseconds, and multiples of ours."""
    lines: list[str] = []
    order = {shape: i for i, shape in enumerate(SHAPES)}
    rows = sorted(rows, key=lambda r: (order.get(f"{r['k']}x{r['n']}", len(order)), r["rows"]))
    for weights, threads, where in sorted({(r["weights"], r["threads"], r["where"]) for r in rows}):
        here = [r for r in rows if (r["weights"], r["threads"], r["where"]) == (weights, threads, where)]
        names = list(dict.fromkeys(name for r in here for name in [*r["us"], *r["missing"]]))[2:]
        lines += ["", f"{weights}, {threads} thread{'s' * (threads > 1)}, {where}", ""]
        lines += ["| K x N | M | ours | kernel | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
        for r in here:
            us = r["us"]
            others = [f"{us[n]:.0f} ({us[n] / us['ours']:.2f}x)" if n in us else "-" for n in names]
            cells = [f"{r['k']} x {r['n']}", r["rows"], f"{us['ours']:.0f}", f"{us['kernel']:.0f}", *others]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def wanted(args) -> Iterator[Line]:
    """The lines asked for."""
    for weights in args.weights:
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            for threads in args.threads:
                for m in args.rows:
                    for where in args.where if m == 1 else args.where[:1]:
                        yield Line(weights, k, n, m, threads, where)


def known(path: str | None) -> list[dict]:
    """The lines in a file of results."""
    if path is None or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


WIDTHS = range(64, 513, 32)


def widths(fmt: str, k: int, m: int) -> list[Contender]:
    """Our kernels for all widths."""
    target = x86.host(cores=1)
    tvm.get_global_func("runtime.config_threadpool")(1, 1)
    problems = [LinearProblem(k, n, parse_format(fmt), parse_activation("int8/token")) for n in WIDTHS]
    return [Contender(problem, target, m, 4, CACHE) for problem in problems]


def cliff(fmt: str, k: int, m: int, contenders: list[Contender], seconds: float) -> str:
    """Throughput over N: no width may fall far behind its neighbours."""
    rates = []
    for n, own in zip(WIDTHS, contenders):
        us = measure({"kernel": own.calls["kernel"]}, own.copies, seconds, 1)["kernel"]
        rates.append(m * k * n / us / 1e3)
    worst = min(b / ((a + c) / 2) for a, b, c in zip(rates, rates[1:], rates[2:]))
    numbers = " ".join(f"{n}:{rate:.0f}" for n, rate in zip(WIDTHS, rates))
    return f"{fmt}, K = {k}, M = {m}: {numbers} G multiply-adds/s; lowest share of its neighbours {worst:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--weights", nargs="+", default=WEIGHTS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target", default="native")
    parser.add_argument("--from", dest="where", nargs="+", default=["cache", "memory"], choices=["cache", "memory"])
    parser.add_argument("--seconds", type=float, default=2.0, help="per line")
    parser.add_argument("--ggml", metavar="FOLDER", help="holds libggml-base.so and libggml-cpu.so")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="see peers/library.py")
    parser.add_argument("--cliff", action="store_true", help="throughput over N instead of the table")
    parser.add_argument("--out", metavar="FILE", help="JSON lines to go on with")
    parser.add_argument("--markdown", action="store_true", help="print what FILE holds, and measure nothing")
    args = parser.parse_args()
    done = {tuple(row[name] for name in Line.__annotations__): row for row in known(args.out)}
    if args.markdown:
        print(markdown(list(done.values())))
        return
    try:
        args.library = ggml.Ggml(args.ggml)
    except FileNotFoundError as error:
        args.library = None
        print(f"llama.cpp: {error}")
    if args.cliff:
        for fmt in args.weights:
            for m in args.rows:
                k = int(args.shapes[0].partition("x")[0])
                print(cliff(fmt, k, m, widths(fmt, k, m), args.seconds), flush=True)
        return
    for line in wanted(args):
        row = done.get(tuple(asdict(line).values()))
        if row is None:
            prepared = Prepared(line, args)
            row = prepared.run()
            prepared.close()
            if args.out is not None:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        print(text(row), flush=True)


if __name__ == "__main__":
    main()
