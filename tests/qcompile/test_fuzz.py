"""Damaged models: whatever bytes change, the answer is a program or one clear error."""

import collections

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from qcompile import ort
from qcompile.capture import capture
from qcompile.codegen import program  # noqa: F401  (registers the converters of kernels)
from qcompile.codegen.relax import to_relax
from qcompile.errors import QcompileError
from qcompile.passes.lower import lower
from qcompile.passes.recognise import recognise
from qcompile.quantization import quantize_model
from qcompile.recipes import get_recipe
from qcompile.report import Report
from qcompile.targets.x86 import AVX2

MUTATIONS = 200
TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[batch, 6, 9, 9] x, int64[batch, s] ids) => (float[batch, 16] y, float[batch, s, 24] z)
{
    c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, wc, bc)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten <axis = 1> (p)
    h = Gemm <transB = 1> (f, w1, b1)
    a = Relu (h)
    y = MatMul (a, w2)
    e = Gather (table, ids)
    n = LayerNormalization <axis = -1> (e, gamma, beta)
    m = MatMul (n, w3)
    g = Sigmoid (m)
    z = Mul (m, g)
}
"""
SHAPES = {
    "wc": (8, 6, 3, 3),
    "bc": (8,),
    "w1": (48, 8),
    "b1": (48,),
    "w2": (48, 16),
    "table": (70, 24),
    "gamma": (24,),
    "beta": (24,),
    "w3": (24, 24),
}


def model() -> bytes:
    built = onnx.parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        built.graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name))
    return built.SerializeToString()


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """One to three bytes or runs replaced, flipped, removed or inserted, mostly outside of the weights."""
    found = bytearray(data)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(900)) if random.random() < 0.8 else int(random.integers(len(found)))
        kind = random.integers(4)
        if kind == 0:
            found[place] = int(random.integers(256))
        elif kind == 1:
            found[place] ^= 1 << int(random.integers(8))
        elif kind == 2:
            del found[place : place + int(random.integers(1, 5))]
        else:
            found[place:place] = bytes(random.integers(0, 256, int(random.integers(1, 4))).tolist())
    return bytes(found)


def compile_to_relax(path) -> None:
    captured = capture(path)
    graph, _ = recognise(captured.model)
    ort.session(graph)
    quantized = quantize_model(graph.clone(), get_recipe("w8a8-rtn"), {}, Report("m", "t", "r"))
    to_relax(lower(quantized), target=AVX2)


def test_damage_never_ends_in_another_error(tmp_path):
    data, random = model(), np.random.default_rng(0)
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    compile_to_relax(path)
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, random))
        try:
            compile_to_relax(path)
        except QcompileError as error:
            assert str(error)
            ends["error"] += 1
        else:
            ends["program"] += 1
    assert ends["error"] > MUTATIONS / 2 and ends["program"] > 5
