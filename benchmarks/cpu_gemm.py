"""Linear kernels on this machine beside ONNX Runtime, shape by shape.

    TVM_NUM_THREADS=2 python benchmarks/cpu_gemm.py                 MiniLM's shapes
    python benchmarks/cpu_gemm.py --shapes 4096x4096 --rows 1 16    others (K x N)

Peers of W8A8 are ``MatMulIntegerToFloat`` (the product alone) and ``DynamicQuantizeMatMul`` (activations quantized too),
of W4A8 and W4 ``MatMulNBits`` with ``accuracy_level`` 4 and 0. `quantize` is our per-token quantizer plus the kernel, to
be read beside peers that quantize. Each call computes several products with weights of their own: `cache` has a few
megabytes of them, `memory` several times the last-level cache. Peers take turns in three blocks, in one process; a
figure is the lowest of the three medians, in microseconds per product. One thread is timed by its own CPU clock, which
other processes disturb least, several by the wall clock.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
import onnxruntime as ort
import tvm
from onnx import TensorProto, helper, numpy_helper

from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.formats import IntFormat, Quantized, parse_activation, parse_format
from qcompile.targets import x86

MINILM = ["384x1152", "384x384", "384x1536:gelu", "1536x384:residual"]
CACHE, MEMORY = 4 << 20, 128 << 20
Call = Callable[[], None]


@dataclass
class Case:
    """One product: shape, rows, formats, and how many weights a call goes through."""

    k: int
    n: int
    m: int
    weight: IntFormat
    activation: str
    epilogue: Epilogue
    copies: int

    def random(self) -> Quantized:
        """Codes and scales."""
        rng = np.random.default_rng(0)
        codes = rng.integers(self.weight.qmin, self.weight.qmax + 1, (self.k, self.n)).astype(np.int8)
        return Quantized(codes, rng.uniform(0.01, 0.02, (self.weight.groups(self.k), self.n)).astype(np.float32))


def ours(case: Case, target: x86.Target, quantize: bool) -> tuple[Call, float]:
    """Our kernel, and the seconds it took to compile."""
    problem = LinearProblem(
        case.k, case.n, case.weight, parse_activation(case.activation), case.epilogue, threads=target.cores
    )
    choice = select(problem, target)
    start = time.perf_counter()
    module = tvm.compile(choice.family.build(problem, choice.config, target, "gemm"), target=target.tvm())
    kernel = module["gemm"]
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(1)
    packed = choice.family.pack(problem, choice.config, case.random())
    weights = [[tvm.runtime.tensor(a) for a in packed.values()] for _ in range(case.copies)]
    rows = tvm.runtime.tensor(rng.normal(size=(case.m, case.k)).astype(np.float32))
    codes = tvm.runtime.tensor(rng.integers(0, 256, (case.m, case.k)).astype(np.uint8))
    scale = tvm.runtime.tensor(np.full(case.m, 0.01, np.float32))
    tail = [tvm.runtime.tensor(np.zeros(case.n, np.float32))] if case.epilogue.bias else []
    tail += [tvm.runtime.tensor(np.zeros((case.m, case.n), np.float32))] if case.epilogue.residual else []
    out = tvm.runtime.empty((case.m, case.n), "float32")
    inputs = [codes, scale] if problem.activation.bits else [rows]
    if not quantize:

        def call() -> None:
            for weight in weights:
                kernel(*inputs, *weight, *tail, out)

        return call, seconds
    rowwise = Rowwise(case.k, f32_output=False, quantize="token").build(target, "quantize")
    quantizer = tvm.compile(tvm.IRModule({"quantize": rowwise}), target=target.tvm())["quantize"]

    def both() -> None:
        for weight in weights:
            quantizer(rows, codes, scale)
            kernel(*inputs, *weight, *tail, out)

    return both, seconds


def onnxruntime(case: Case, operator: str, threads: int) -> Call:
    """ONNX Runtime's node followed by the same tail, ``case.copies`` times."""
    weight = case.random()
    codes, scale = weight.codes, weight.scale
    inputs, nodes, constants, outputs = [], [], [], []

    def constant(name: str, array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(array, name))
        return name

    def value(name: str, shape: tuple[int, ...], dtype: int) -> str:
        inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    feeds: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(1)
    if operator == "MatMulIntegerToFloat":
        x = value("x", (case.m, case.k), TensorProto.UINT8)
        feeds["x"] = rng.integers(0, 256, (case.m, case.k)).astype(np.uint8)
    else:
        x = value("x", (case.m, case.k), TensorProto.FLOAT)
        feeds["x"] = rng.normal(size=(case.m, case.k)).astype(np.float32)
    if case.epilogue.residual:
        value("r", (case.m, case.n), TensorProto.FLOAT)
        feeds["r"] = np.zeros((case.m, case.n), np.float32)
    bias = constant("bias", np.zeros(case.n, np.float32)) if case.epilogue.bias else ""
    for i in range(case.copies):
        y, options = f"y{i}", {}
        if operator == "MatMulNBits":
            block = case.weight.group
            unsigned = (codes.T + 8).astype(np.uint8).reshape(case.n, case.k // block, block)
            nibbles = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
            names = [
                x,
                constant(f"w{i}", nibbles),
                constant(f"s{i}", np.ascontiguousarray(scale.T).reshape(-1)),
                "",
                "",
                bias,
            ]
            level = 4 if case.activation != "none" else 0
            options = {"K": case.k, "N": case.n, "bits": 4, "block_size": block, "accuracy_level": level}
        elif operator == "MatMulIntegerToFloat":
            one = [
                constant(f"a{i}", np.float32(0.01)),
                constant(f"s{i}", scale[0]),
                constant(f"z{i}", np.uint8(128)),
                "",
            ]
            names = [x, constant(f"w{i}", codes), *one, bias]
        else:
            names = [x, constant(f"w{i}", codes), constant(f"s{i}", scale[0]), "", bias]
        while names and not names[-1]:
            names.pop()
        nodes.append(helper.make_node(operator, names, [y], domain="com.microsoft", **options))
        if case.epilogue.activation == "gelu":
            nodes.append(helper.make_node("Gelu", [y], [f"g{i}"], domain="com.microsoft"))
            y = f"g{i}"
        if case.epilogue.residual:
            nodes.append(helper.make_node("Add", [y, "r"], [f"o{i}"]))
            y = f"o{i}"
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, (case.m, case.n)))
    graph = helper.make_graph(nodes, "peer", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in outputs:
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def peers(case: Case) -> list[str]:
    """ONNX Runtime's operators for the same product."""
    if case.weight.bits == 8:
        return ["MatMulIntegerToFloat", "DynamicQuantizeMatMul"] if case.activation != "none" else []
    return ["MatMulNBits"] if case.weight.bits == 4 and case.weight.group and case.k % case.weight.group == 0 else []


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=MINILM, metavar="KxN[:gelu|:residual]")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--weights", nargs="+", default=["int8", "int4/g32"])
    parser.add_argument("--activation", default="int8/token", help="int8/token, or none for weight-only kernels")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target", default="native")
    parser.add_argument("--from", dest="where", nargs="+", default=["cache"], choices=["cache", "memory"])
    parser.add_argument("--seconds", type=float, default=0.3, help="per line")
    args = parser.parse_args()
    pool = tvm.get_global_func("runtime.config_threadpool")
    header = [
        "K",
        "N",
        "tail",
        "weights",
        "M",
        "thr",
        "from",
        "GMAC/s",
        "ours",
        "quantize",
        "peer",
        "peer, quantizing",
        "ratio",
    ]
    widths = [5, 5, 8, 8, 4, 3, 6, 7, 8, 8, 8, 16, 6]
    print(" ".join(title.rjust(w) for title, w in zip(header, widths)))
    for shape in args.shapes:
        size, _, tail = shape.partition(":")
        k, n = map(int, size.split("x"))
        epilogue = Epilogue(True, tail if tail == "gelu" else "", tail == "residual")
        for spelling in args.weights:
            weight = parse_format(spelling)
            for m in args.rows:
                for where in args.where:
                    copies = max(2, -(-(CACHE if where == "cache" else MEMORY) * 8 // (k * n * weight.bits)))
                    copies = min(copies, 8) if where == "cache" else copies
                    case = Case(k, n, m, weight, args.activation, epilogue, copies)
                    for threads in args.threads:
                        target = x86.host() if args.target == "native" else x86.named(args.target, max(args.threads))
                        pool(1, threads)
                        calls = {"ours": ours(case, target, False)[0]}
                        if args.activation != "none":
                            calls["quantize"] = ours(case, target, True)[0]
                        calls |= {name: onnxruntime(case, name, threads) for name in peers(case)}
                        us = measure(calls, copies, args.seconds, threads)
                        alone = us.get("MatMulIntegerToFloat")
                        whole = us.get("DynamicQuantizeMatMul", us.get("MatMulNBits"))
                        best = us.get("quantize", us["ours"])
                        cells = [k, n, tail or "-", spelling, m, threads, where, f"{m * k * n / us['ours'] / 1e3:.0f}"]
                        cells += [f"{x:.1f}" if x else "-" for x in (us["ours"], us.get("quantize"), alone, whole)]
                        cells.append(f"{whole / best:.2f}" if whole else "-")
                        print(" ".join(str(c).rjust(w) for c, w in zip(cells, widths)), flush=True)


if __name__ == "__main__":
    main()
