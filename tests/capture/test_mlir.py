"""Emitted MLIR is compiled by MLIR's own passes, executed, and compared with ONNX Runtime."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import ort
from qcompile.capture import emit_mlir
from qcompile.errors import ModelError, UnsupportedOperatorError

BLOCK = """g (float[b, s, 16] x, float[b, s, 2] cos, float[b, s, 2] sin, bool[b, 1, s, s] mask) => (float[b, s, 16] y) {
    split = Constant<value_ints = [0, 0, 4, 4]>() pair = Constant<value_ints = [0, 0, 2, 4]>() join = Constant<value_ints = [0, 0, 16]>()
    n = RMSNormalization<epsilon = 1e-5>(x, gain)
    q0 = MatMul(n, wq) k0 = MatMul(n, wk) v0 = MatMul(n, wk)
    q1 = Reshape(q0, split) k1 = Reshape(k0, pair) v1 = Reshape(v0, pair)
    q2 = Transpose<perm = [0, 2, 1, 3]>(q1) k2 = Transpose<perm = [0, 2, 1, 3]>(k1) v = Transpose<perm = [0, 2, 1, 3]>(v1)
    q = RotaryEmbedding(q2, cos, sin) k = RotaryEmbedding(k2, cos, sin)
    a = Attention<scale = 0.5, is_causal = 1>(q, k, v, mask)
    a1 = Transpose<perm = [0, 2, 1, 3]>(a) a2 = Reshape(a1, join) r = Add(x, a2)
    m = LayerNormalization(r, gain, bias) u = MatMul(m, wq) g0 = Swish(u) g1 = Gelu(m) h = Mul(g0, g1) y = Add(r, h) }"""

BUFFERIZE = (
    "one-shot-bufferize{bufferize-function-boundaries=true function-boundary-type-conversion=identity-layout-map}"
)
TO_LLVM = (
    BUFFERIZE,
    "func.func(convert-linalg-to-loops)",
    "convert-bufferization-to-memref",
    "func.func(lower-affine)",
    "func.func(llvm-request-c-wrappers)",
    "convert-scf-to-cf",
    "expand-strided-metadata",
    "func.func(lower-affine)",
    "convert-math-to-llvm",
    "convert-math-to-libm",
    "convert-arith-to-llvm",
    "finalize-memref-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-index-to-llvm",
    "reconcile-unrealized-casts",
)


def block() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {"gain": (16,), "bias": (16,), "wq": (16, 16), "wk": (16, 8)}
    weights = [ir.tensor(rng.standard_normal(s).astype(np.float32) / 3, name=n) for n, s in arrays.items()]
    return ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 24]>\n{BLOCK}', initializers=weights)


class _Unranked(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int64), ("descriptor", ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.POINTER(_Unranked), ctypes.POINTER(_Unranked))
def _memref_copy(size, source, target):
    """What MLIR's C runner library calls memrefCopy, which the wheel does not bring."""

    def view(memref: _Unranked) -> np.ndarray | None:
        rank = memref.rank
        words = (ctypes.c_int64 * (3 + 2 * rank)).from_address(memref.descriptor)
        shape, strides = tuple(words[3 : 3 + rank]), tuple(size * w for w in words[3 + rank : 3 + 2 * rank])
        if 0 in shape:
            return None
        last = sum((n - 1) * s for n, s in zip(shape, strides)) + size
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * last).from_address(words[1] + words[2] * size))
        return np.lib.stride_tricks.as_strided(raw, shape=(*shape, size), strides=(*strides, 1))

    data, result = view(source[0]), view(target[0])
    if data is not None and result is not None:
        result[...] = data


def execute(text: str, calls: list[list[np.ndarray]], rank: int) -> list[np.ndarray]:
    """Compile the module and call its function, which returns one float tensor of that rank, on each list of inputs."""
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.ir import Context, Module
    from torch_mlir.passmanager import PassManager
    from torch_mlir.runtime import (
        as_ctype,
        get_ranked_memref_descriptor,
        make_nd_memref_descriptor,
        ranked_memref_to_numpy,
    )

    context = Context()
    torch_dialect.register_dialect(context)
    with context:
        module = Module.parse(text)
        for pipeline in TO_LLVM:
            PassManager.parse(f"builtin.module({pipeline})").run(module.operation)
    engine = ExecutionEngine(module, opt_level=2)
    engine.raw_register_runtime("memrefCopy", ctypes.cast(_memref_copy, ctypes.c_void_p))
    results = []
    for inputs in calls:
        result = make_nd_memref_descriptor(rank, as_ctype(np.float32))()
        descriptors = [get_ranked_memref_descriptor(np.ascontiguousarray(x)) for x in inputs]
        pointers = [ctypes.pointer(ctypes.pointer(d)) for d in (result, *descriptors)]
        engine.invoke("main", *pointers)
        results.append(ranked_memref_to_numpy(ctypes.pointer(result)).copy())
    return results


def test_linalg_computes_what_the_model_does() -> None:
    pytest.importorskip("torch_mlir", reason="the extra mlir is not installed")
    model = block()
    rng = np.random.default_rng(1)
    calls = []
    for batch, length in ((1, 1), (2, 5), (3, 4)):
        feeds = {
            "x": rng.standard_normal((batch, length, 16)).astype(np.float32),
            "cos": rng.standard_normal((batch, length, 2)).astype(np.float32),
            "sin": rng.standard_normal((batch, length, 2)).astype(np.float32),
            "mask": np.ones((batch, 1, length, length), bool),
        }
        feeds["mask"][-1, :, :, length // 2 + 1 :] = False
        calls.append(feeds)
    text = emit_mlir(model, "linalg")
    assert "torch." not in text and "linalg." in text
    results = execute(text, [list(feeds.values()) for feeds in calls], 3)
    for (expected,), got in zip((ort.run(model, call).values() for call in calls), results):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_kinds() -> None:
    pytest.importorskip("torch_mlir", reason="the extra mlir is not installed")
    model = block()
    whole = emit_mlir(model, "onnx")
    assert 'torch.operator "onnx.Attention"' in whole and "@main" in whole
    assert "torch.aten.matmul" in emit_mlir(model, "torch")
    assert len(emit_mlir(model, "onnx", weights=False)) < len(whole)
    assert "Attention" in {node.op_type for node in model.graph}, "the model is not changed"


def test_operator_without_lowering_is_named() -> None:
    pytest.importorskip("torch_mlir", reason="the extra mlir is not installed")
    text = "g (float[1, 1, 4, 4] x, int64[1, 1, 4, 4] i) => (float[1, 1, 8, 8] y) { y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(x, i) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    with pytest.raises(UnsupportedOperatorError, match=r"(?i)max_?unpool"):
        emit_mlir(model, "linalg")


def test_unknown_kind() -> None:
    with pytest.raises(ModelError, match="kind 'spirv'"):
        emit_mlir(block(), "spirv")  # type: ignore[arg-type]


def test_without_torch_mlir(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_mlir", "torch_mlir.dialects", "torch_mlir.extras", "torch_mlir.ir", "torch_mlir.passmanager"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"install qcompile\[mlir\]"):
        emit_mlir(block())
