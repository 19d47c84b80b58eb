"""Models of odd make on the FPGA target: their hardware computes them, or an error names what stands in the way."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qcompile
from qcompile.errors import UnsupportedOperatorError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def model(graph, opset=22, **weights):
    """A model from its text ``(inputs) => (outputs) { nodes }``, with random weights of the given shapes."""
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {graph}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        made.graph.initializer.append(numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name))
    return made


def compiled(made, folder, *shapes, **options):
    """Compiled on random samples; the report says how the C program, ``model.onnx`` and the float model differ."""
    onnx.save(made, folder / "model.onnx")
    rng = np.random.default_rng(1)
    names = [value.name for value in made.graph.input]
    samples = [
        {name: rng.standard_normal((1, *shape)).astype(np.float32) for name, shape in zip(names, shapes)}
        for _ in range(48)
    ]
    return qcompile.compile(
        str(folder / "model.onnx"), target="fpga", recipe="fixed-w4a8", calibration=samples, output=str(folder / "out"), options=options
    )  # fmt: skip


def check(result, cosine=0.98):
    quality = result.report.quality
    assert quality["program_to_onnx_error"] == 0
    assert quality["onnx_to_float_cosine"] > cosine


FUNCTIONS = {
    "Abs": "", "Celu": "<alpha: float = 0.7>", "Cos": "", "Elu": "", "Erf": "", "Exp": "", "HardSigmoid": "", "HardSwish": "",
    "LeakyRelu": "<alpha: float = 0.2>", "Mish": "", "Selu": "", "Sigmoid": "", "Sin": "", "Softplus": "", "Softsign": "",
    "Tanh": "", "ThresholdedRelu": "<alpha: float = 0.3>",
}  # fmt: skip


def test_functions_of_one_variable_and_constants_around_them(tmp_path):
    nodes = "".join(f"f{i} = {op} {attributes} (h)\n" for i, (op, attributes) in enumerate(FUNCTIONS.items()))
    count = len(FUNCTIONS)
    outputs = ", ".join(f"float[n, 5] f{i}" for i in range(count))
    made = model(
        f"""(float[n, 5] x) => ({outputs}, float[n, 5] a, float[n, 5] b, float[n, 5] c, float[n, 5] d, float[n, 5] e)
        <float one = {{1}}, float[5] steps = {{-1, 0.5, 2, 3, -0.25}}, float slope = {{0.3}}>
        {{
            h = MatMul (x, w)
            {nodes}
            a = Sub (one, f{list(FUNCTIONS).index("Sigmoid")})
            r = Relu (x)
            b = Div (r, steps)
            n = Neg (f{list(FUNCTIONS).index("Tanh")})
            c = Mul (n, steps)
            d = Sub (steps, h)
            e = PRelu (h, slope)
        }}""",
        w=(5, 5),
    )
    check(compiled(made, tmp_path, (5,)), 0.99)


def test_a_recurrent_network_whose_steps_share_their_weights(tmp_path):
    made = model(
        """(float[n, 6] x0, float[n, 6] x1) => (float[n, 3] y) <float one = {1}>
        {
            h = MatMul (x0, wx)
            s0 = Tanh (h)
            zx = MatMul (x1, wx)
            zh = MatMul (s0, wh)
            zs = Add (zx, zh)
            z = Sigmoid (zs)
            keep = Sub (one, z)
            old = Mul (z, s0)
            c0 = MatMul (x1, wx)
            c1 = MatMul (s0, wh)
            cs = Add (c0, c1)
            c = Tanh (cs)
            new = Mul (keep, c)
            s1 = Add (old, new)
            y = MatMul (s1, wy)
        }""",
        wx=(6, 7),
        wh=(7, 7),
        wy=(7, 3),
    )
    check(compiled(made, tmp_path, (6,), (6,)))


def test_windows_slide_over_sequences(tmp_path):
    made = model(
        """(float[n, 2, 13] x) => (float[n, 5] y)
        {
            a = Conv <strides: ints = [2], pads: ints = [1, 2]> (x, w1, b1)
            b = Relu (a)
            c = MaxPool <kernel_shape: ints = [2]> (b)
            d = Conv <group: int = 7, dilations: ints = [2], pads: ints = [1, 1]> (c, w2)
            e = AveragePool <kernel_shape: ints = [2]> (d)
            f = GlobalAveragePool (e)
            g = Flatten (f)
            y = MatMul (g, w3)
        }""",
        w1=(7, 2, 3),
        b1=(7,),
        w2=(7, 1, 2),
        w3=(7, 5),
    )
    check(compiled(made, tmp_path, (2, 13)))


def test_what_a_matrix_made_becomes_an_image(tmp_path):
    made = model(
        """(float[n, 6] x) => (float[n, 3, 2, 3] y) <int64[4] shape = {0, 2, 3, 4}>
        {
            h = MatMul (x, w1)
            r = Relu (h)
            i = Reshape (r, shape)
            y = Conv (i, w2)
        }""",
        w1=(6, 24),
        w2=(3, 2, 2, 2),
    )
    check(compiled(made, tmp_path, (6,)))


@pytest.mark.parametrize(
    ("graph", "shapes", "message"),
    [
        (
            "(float[n, 6] x) => (float[n, 4] y) { h = MatMul (x, w)  y = Softmax (h) }",
            {"w": (6, 4)},
            "let the model end with what the softmax reads",
        ),
        (
            "(float[n, 6] x) => (float[n, 4] y) { h = MatMul (x, w)  s = Sinh (h)  t = Cosh (s)  y = Sinh (t) }",
            {"w": (6, 4)},
            "Sinh 'node_1', Cosh 'node_2', 1 more have no fixed-point form",
        ),
        (
            "(float[n, 6] x) => (float[n, 4] y) { h = MatMul (x, w)  y = PRelu (h, s) }",
            {"w": (6, 4), "s": (4,)},
            "PRelu 'node_1': its slope must be the same for all channels",
        ),
        (
            "(float[n, 6] x) => (float[n, 4, 4] y) <int64[3] a = {0, 4, 1}, int64[3] b = {0, 1, 4}>"
            "{ h = MatMul (x, w)  c = Reshape (h, a)  d = Reshape (h, b)  y = Mul (c, d) }",
            {"w": (6, 4)},
            "two activations must have the same",
        ),
    ],
)
def test_what_has_no_hardware_is_refused_by_name(graph, shapes, message, tmp_path):
    with pytest.raises(UnsupportedOperatorError) as caught:
        compiled(model(graph, **shapes), tmp_path, (6,))
    assert message in str(caught.value)


def test_indices_are_refused(tmp_path):
    made = model("(int64[n, 3] x) => (float[n, 3, 4] y) { y = Gather (w, x) }", w=(9, 4))
    onnx.save(made, tmp_path / "model.onnx")
    samples = [{"x": np.array([[i, 1, 2]])} for i in range(4)]
    with pytest.raises(UnsupportedOperatorError, match="'x' is INT64; hardware takes numbers, not indices"):
        qcompile.compile(
            str(tmp_path / "model.onnx"), target="fpga", recipe="fixed-w4a8", calibration=samples, output=str(tmp_path / "out")
        )  # fmt: skip
