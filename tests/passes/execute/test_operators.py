"""Operators of the interpreter compute what ONNX Runtime computes; what they cannot is refused."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qcompile.errors import UnsupportedOperatorError
from qcompile.passes.execute import run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 5)).astype(np.float32)
ROWS = np.array([[0], [2], [0]], np.int64)
UPDATES = RNG.normal(size=(3, 4, 5)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 3, 6, 7)).astype(np.float32)
VOLUME = RNG.normal(size=(1, 2, 5, 6, 4)).astype(np.float32)


def model_of(op_type, arrays, **attributes):
    names = [f"x{i}" for i in range(len(arrays))]
    constants = [numpy_helper.from_array(a, n) for a, n in list(zip(arrays, names))[1:]]
    first = helper.make_tensor_value_info("x0", helper.np_dtype_to_tensor_dtype(arrays[0].dtype), arrays[0].shape)
    node = helper.make_node(op_type, names, ["y"], name="the node", **attributes)
    graph = helper.make_graph([node], "one", [first], [onnx.ValueInfoProto(name="y")], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


CASES = [
    ("CumSum", [X, np.array(1, np.int64)], {}),
    ("CumSum", [X, np.array(1, np.int64)], {"reverse": 1}),
    ("CumSum", [X, np.array(-1, np.int64)], {"exclusive": 1}),
    ("CumSum", [X, np.array(0, np.int64)], {"exclusive": 1, "reverse": 1}),
    *[("ScatterND", [X, ROWS, UPDATES], {"reduction": how}) for how in ("add", "mul", "max", "min")],
    ("ScatterND", [X, np.array([[-1, 2], [1, -4]]), UPDATES[:2, 0]], {}),
    *[("ScatterElements", [X, np.array([[[0], [-3]]]), UPDATES[:1, :2, :1]], {"axis": 2, "reduction": how})
      for how in ("none", "add", "mul", "max", "min")],
    ("GatherElements", [X, np.array([[[0, -1, 2, 4, -5]]])], {"axis": 2}),
    ("ArgMax", [np.round(X)], {"axis": 2}),
    ("ArgMax", [np.round(X)], {"axis": 2, "select_last_index": 1}),
    *[("Cast", [4 * np.abs(X)], {"to": kind}) for kind in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13)],
    *[("ConvTranspose", [IMAGE, RNG.normal(size=(3, 2, 3, 2)).astype(np.float32)], {"strides": [2, 1], **how})
      for how in ({}, {"pads": [1, 0, 1, 0]}, {"pads": [0, 1, 2, 0]}, {"output_padding": [1, 0]},
                  {"auto_pad": "SAME_UPPER"}, {"output_shape": [12, 8]})],
    *[(kind, [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], **how}) for kind in ("MaxPool", "AveragePool")
      for how in ({}, {"pads": [1, 0, 1, 1]}, {"auto_pad": "SAME_LOWER"})],
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    *[(kind, [VOLUME], {"kernel_shape": [2, 3, 2], "pads": [0, 1, 0, 1, 1, 0]}) for kind in ("MaxPool", "AveragePool")],
    *[("Pad", [X, np.array([0, 1, 2, 0, 2, 1])], {"mode": mode}) for mode in ("constant", "reflect", "edge")],
    ("OneHot", [np.array([0, -1, 2, 7, -9]), np.array(4, np.int64), np.array([2.0, 5.0], np.float32)], {}),
]  # fmt: skip


@pytest.mark.parametrize("op_type, arrays, attributes", CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_results_are_those_of_onnx_runtime(op_type, arrays, attributes):
    proto = model_of(op_type, arrays, **attributes)
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, {"x0": arrays[0]})[0]
    found = run(ir.from_proto(proto), {"x0": arrays[0]})["y"].numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "op_type, arrays, attributes",
    [
        ("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
        ("Pad", [X, np.array([0, 1, 2, 0, 2, 1])], {"mode": "wrap"}),
        ("Det", [X[:, :, :4]], {}),
    ],
)
def test_what_is_not_implemented_is_refused_by_the_name_of_the_node(op_type, arrays, attributes):
    proto = model_of(op_type, arrays, **attributes)
    with pytest.raises(UnsupportedOperatorError, match=f"'the node'.*{op_type}"):
        run(ir.from_proto(proto), {"x0": arrays[0]})
