"""ONNX Runtime's quantized matrix products, each as a session of several products with weights of their own.

The weights of the products differ (rows are rotated): ONNX Runtime keeps one copy of packed weights that are equal, which then
would come from the cache where they should come from memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Call = Callable[[], None]


def nbits(k: int, n: int, m: int, bits: int, group: int, copies: int, threads: int, lut: bool = False) -> Call:
    """``MatMulNBits`` with ``accuracy_level`` 4 (int8 activations); ``lut`` asks for its look-up kernel."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, (n, k // group, group * bits // 8)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, n * (k // group)).astype(np.float32)
    options = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": 4}
    constants, nodes = [], []
    for i in range(copies):
        constants += [numpy_helper.from_array(np.roll(weight, i, 0), f"w{i}"), numpy_helper.from_array(scale, f"s{i}")]
        nodes.append(
            helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **options)
        )
    return _session(nodes, constants, rng.normal(size=(m, k)).astype(np.float32), n, threads, lut)


def integers(k: int, n: int, m: int, copies: int, threads: int, quantize: bool) -> Call:
    """8-bit products, exact (``session.x64quantprecision``): with the quantizer of the activations, or without."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-128, 128, (k, n)).astype(np.int8), rng.uniform(0.01, 0.02, n).astype(np.float32)
    step, zero = np.float32(0.01), np.uint8(128)
    constants, nodes = [], []
    for i in range(copies):
        own = np.roll(codes, i, 0)
        arrays = {"w": own, "s": scale} if quantize else {"w": own, "a": step, "s": scale, "z": zero}
        constants += [numpy_helper.from_array(np.asarray(a), f"{name}{i}") for name, a in arrays.items()]
        kind = "DynamicQuantizeMatMul" if quantize else "MatMulIntegerToFloat"
        names = ["x", *(f"{name}{i}" for name in arrays)]
        nodes.append(helper.make_node(kind, names, [f"y{i}"], domain="com.microsoft"))
    x = rng.normal(size=(m, k)).astype(np.float32) if quantize else rng.integers(0, 256, (m, k)).astype(np.uint8)
    return _session(nodes, constants, x, n, threads, False)


def floats(k: int, n: int, m: int, copies: int, threads: int) -> Call:
    """``MatMul`` of float32 weights: what becomes of formats that ONNX Runtime has no kernel for, when it folds constants."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(k, n)).astype(np.float32)
    constants = [numpy_helper.from_array(np.roll(weight, i, 0), f"w{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(copies)]
    return _session(nodes, constants, rng.normal(size=(m, k)).astype(np.float32), n, threads, False)


def _session(nodes: list, constants: list, x: np.ndarray, n: int, threads: int, lut: bool) -> Call:
    kind = TensorProto.FLOAT if x.dtype == np.float32 else TensorProto.UINT8
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (len(x), n)) for node in nodes]
    graph = helper.make_graph(nodes, "peer", [helper.make_tensor_value_info("x", kind, x.shape)], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lut:
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for output in outputs:
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)
