"""Steps of recipes and the asks they name."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.errors import RecipeError
from qcompile.passes.asks import Ask, Context, Permute, Rotate, RotateOnline, Smooth, register_ask, registered_asks
from qcompile.passes.asks.base import Rewrite
from qcompile.passes.asks.online import Kronecker, insert_online, plain_products
from qcompile.recipes import Recipe, Step
from qcompile.transforms import list_transforms, resolve, step_of


def test_every_registered_ask_is_a_dataclass_with_a_description_and_options_a_recipe_can_hold():
    for name, text in list_transforms().items():
        cls = registered_asks()[name]
        assert text.endswith(".") and len(text) > 20, name
        for field in dataclasses.fields(cls):
            # None stands for an option that is left out.
            assert isinstance(field.default, (bool, int, float, str, type(None))), f"{name}.{field.name}"
        assert resolve(Step(name)) == cls() and step_of(cls()) == Step(name)


@pytest.mark.parametrize(
    "ask", [Smooth(0.3, 5), Rotate("klt"), RotateOnline(64, everywhere=True), Permute("zigzag", 64)]
)
def test_an_ask_becomes_a_step_and_comes_back(ask):
    assert resolve(step_of(ask)) == ask


def test_recipes_take_names_steps_and_asks():
    recipe = Recipe("r", transforms=("rotate", Step("smooth", {"alpha": 0.4}), RotateOnline(32)))
    assert recipe.transforms == (Step("rotate"), Step("smooth", {"alpha": 0.4}), Step("rotate-online", {"block": 32}))


def test_a_class_of_ones_own_is_found_by_file_or_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom qcompile.passes.asks import Ask\n"
        "@dataclass(frozen=True)\nclass Mine(Ask):\n    strength: float = 1.0\nclass Other: pass\n"
    )
    ask = resolve(Step(f"{file}:Mine", {"strength": 2.0}))
    assert isinstance(ask, Ask) and ask.strength == 2.0 and type(resolve(Step(f"{file}:Mine"))) is type(ask)
    assert resolve(Step("qcompile.passes.asks:Smooth")) == Smooth()
    with pytest.raises(RecipeError, match="not a dataclass derived from"):
        resolve(Step(f"{file}:Other"))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("smoth"), "unknown transform 'smoth'; known: "),
        (Step("smooth", {"alhpa": 1}), "no option 'alhpa'; its options: alpha, search, limit"),
        (Step("nowhere.py:A"), "cannot be loaded"),
        (Step("qcompile.passes.asks:Nothing"), "cannot be loaded"),
        (Step("permute", {"order": "x"}), "choose sort"),
        (Step("smooth", {"alpha": "0.5"}), "'smooth': alpha is a number, not '0.5'"),
        (Step("smooth", {"alpha": True}), "alpha is a number, not True"),
        (Step("smooth", {"search": 2.5}), "search is a whole number, not 2.5"),
        (Step("smooth", {"search": -3}), "search is 0 or"),
        (Step("smooth", {"limit": 0}), "at least 1"),
        (Step("awq", {"grid": 0}), "at least one exponent"),
        (Step("rotate", {"everywhere": 1}), "everywhere is true or false, not 1"),
        (Step("rotate", {"kind": 4}), "kind is a text, not 4"),
        (Step("rotate-online", {"signs": True, "seed": -1}), "a seed is 0 or a positive number, not -1"),
    ],
)
def test_mistakes_are_explained(step, text):
    with pytest.raises(RecipeError, match=text):
        resolve(step)


def test_names_are_taken_once():
    with pytest.raises(RecipeError, match="exists already"):
        register_ask("smooth")(Smooth)


@pytest.mark.parametrize(
    ("width", "options", "order"),
    [(1408, {}, 1408), (1408, {"block": 128}, 128), (36, {"pad": True, "block": 32}, 32), (44, {"signs": True}, 44)],
)
def test_online_rotations_compile_and_agree_with_onnx_runtime(tmp_path, width, options, order):
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["rows", width]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(rng.standard_normal((width, 8)).astype(np.float32), name="w"))
    node = ir.node("MatMul", [x, w], name="linear")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["rows", 8]), x.type
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    samples = rng.standard_normal((4, 6, width)).astype(np.float32)
    samples[..., 5] *= 40
    results = {}
    for name, transforms in (("plain", ()), ("rotated", (RotateOnline(everywhere=True, **options),))):
        results[name] = qcompile.compile(
            ir.Model(graph.clone(), ir_version=10),
            recipe="w8a8-rtn",
            transforms=transforms,
            calibration=[{"x": rows} for rows in samples],
            output=tmp_path / name,
            keep_stages=tmp_path / f"{name}-stages",
            progress=False,
        )
    quality = {name: model.report.quality for name, model in results.items()}
    assert quality["rotated"]["program_to_onnx_error"] < 1e-2
    assert quality["rotated"]["program_to_float_error"] < 0.7 * quality["plain"]["program_to_float_error"]
    lowered = ir.load(next((tmp_path / "rotated-stages").glob("*lowered.onnx")))
    (row,) = [n for n in lowered.graph if n.op_type == "Rowwise"]
    assert row.attributes["hadamard"].value == order, "fused with the quantizer"
    assert not any(n.op_type in ("BlockRotate", "Kronecker", "Mul") for n in lowered.graph)


def test_signs_before_a_rotation_join_the_norm_that_others_read_too(tmp_path):
    """LayerNorm -> signs -> rotation -> quantizer is one kernel, which also stores the norm for the residual."""
    rng = np.random.default_rng(0)
    model = norm_and_linear(rng, 48)
    samples = rng.standard_normal((4, 6, 48)).astype(np.float32) + 1
    compiled = qcompile.compile(
        model,
        recipe="w8a8-rtn",
        transforms=(RotateOnline(everywhere=True, signs=True),),
        calibration=[{"x": rows} for rows in samples],
        output=tmp_path / "block",
        keep_stages=tmp_path / "stages",
        progress=False,
    )
    assert compiled.report.quality["program_to_onnx_error"] < 1e-2
    lowered = ir.load(next((tmp_path / "stages").glob("*lowered.onnx")))
    (row,) = [n for n in lowered.graph if n.op_type == "Rowwise"]
    assert row.attributes["producer"].value == "layernorm" and row.attributes["hadamard"].value == 48
    assert row.outputs[0].uses()
    assert not any(n.op_type in ("Mul", "Kronecker", "BlockRotate") for n in lowered.graph)


@dataclass(frozen=True)
class Mix(Rewrite):
    """Puts a Kronecker product of random matrices in front of every linear operator."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        rng = np.random.default_rng(3)
        left, right = (rng.standard_normal((n, n)) / n + np.eye(n) for n in (4, 12))
        jobs: dict[str, list[str]] = {}
        for node in plain_products(model, context):
            jobs.setdefault(node.inputs[0].name, []).append(node.name)
        insert_online(model, jobs, Kronecker(left, right))
        return True


def test_products_with_other_matrices_join_the_row_kernel(tmp_path):
    """LayerNorm -> learned Kronecker product -> quantizer is one kernel."""
    rng = np.random.default_rng(0)
    compiled = qcompile.compile(
        norm_and_linear(rng, 48),
        recipe="w8a8-rtn",
        transforms=(Mix(),),
        calibration=[{"x": rng.standard_normal((6, 48)).astype(np.float32) + 1} for _ in range(4)],
        output=tmp_path / "block",
        keep_stages=tmp_path / "stages",
        progress=False,
    )
    assert compiled.report.quality["program_to_onnx_error"] < 1e-2
    assert compiled.report.quality["program_to_float_error"] < 2e-2
    lowered = ir.load(next((tmp_path / "stages").glob("*lowered.onnx")))
    assert [n.op_type for n in lowered.graph] == ["Rowwise", "Linear"]
    assert lowered.graph[0].attributes["producer"].value == "layernorm"


def norm_and_linear(rng: np.random.Generator, width: int) -> ir.Model:
    """``n = LayerNorm(x); y = n + n W``, as a graph."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", width]), type=ir.TensorType(ir.DataType.FLOAT))
    arrays = {"w": (width, width), "gamma": (width,), "beta": (width,)}
    constants = {
        k: ir.Value(
            name=k, const_value=ir.tensor((rng.standard_normal(s) / 7 + (k == "gamma")).astype(np.float32), name=k)
        )
        for k, s in arrays.items()
    }
    norm = ir.node("LayerNormalization", [x, constants["gamma"], constants["beta"]], {"axis": -1}, name="norm")
    linear = ir.node("MatMul", [norm.outputs[0], constants["w"]], name="linear")
    total = ir.node("Add", [norm.outputs[0], linear.outputs[0]], name="total")
    for node, name in ((norm, "n"), (linear, "l"), (total, "y")):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, x.shape, x.type
    nodes = [norm, linear, total]
    graph = ir.Graph(
        [x], [total.outputs[0]], nodes=nodes, initializers=list(constants.values()), opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)
