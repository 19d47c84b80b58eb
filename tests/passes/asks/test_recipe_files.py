"""Every transform, named in a recipe file, goes to the end: the compiled program agrees with the float model."""

import logging

import miniatures
import numpy as np
import oracle
import pytest

import qcompile
from qcompile.passes.asks import registered_asks
from qcompile.passes.learn import Learned
from qcompile.passes.spaces.prove import random_inputs
from qcompile.recipes import list_recipes

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)

STACKS = {
    "llama": [
        '{ name = "pair-scale", share = 0.4 }',
        '{ name = "awq", grid = 3 }',
        '{ name = "split-channels", threshold = 1.2, extra = 0.5 }',
        '{ name = "permute", order = "zigzag", block = 8 }',
        '"rotate"',
        '{ name = "rotate-online", pad = true, signs = true }',
        '"clip"',
    ],
    "qwen3": ['{ name = "column-scale", power_of_two = true }', '"promote-silu"', '"smooth"', '"rotate-keys"'],
    "opt": ['"centre"', '"move-bias"', '"symmetrize"', '{ name = "rotate", kind = "klt" }'],
    "vit": ['"reparametrize"', '{ name = "noise", bits = 6 }'],
    "clipped": ['"promote-clip"', '"equalize"'],
}


def clipped():
    """Two convolutions with a ReLU6 in between."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((8, 3, 3, 3)), "v": rng.standard_normal((4, 8, 1, 1))}
    constants = {k: v.astype(np.float32) for k, v in constants.items()}
    constants |= {"lo": np.array(0, np.float32), "hi": np.array(6, np.float32)}
    body = "a = Conv(x, w) c = Clip(a, lo, hi) y = Conv(c, v)"
    return oracle.parse(body, {"x": (1, 3, 8, 8)}, constants, (1, 4, 6, 6))


def test_the_stacks_name_every_transform_that_is_not_learned():
    named = {name for name, cls in registered_asks().items() if not issubclass(cls, Learned) and ":" not in name}
    written = " ".join(step for steps in STACKS.values() for step in steps)
    assert not [name for name in named if f'"{name}"' not in written]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STACKS))
def test_a_stack_of_a_recipe_file_reaches_the_program(tmp_path, name):
    file = tmp_path / "stack.toml"
    file.write_text('base = "w8a8-rtn"\ntransforms = [\n' + ",\n".join(STACKS[name]) + "\n]\n")
    model = clipped() if name == "clipped" else miniatures.model(name)
    types = {v.name: v.dtype.numpy() for v in model.graph.inputs}
    compiled = qcompile.compile(
        model,
        recipe=str(file),
        calibration=[
            {k: x.astype(types[k]) for k, x in random_inputs(model, np.random.default_rng(i)).items()} for i in range(3)
        ],
        output=tmp_path / "out",
        progress=False,
    )
    assert len(compiled.report.transforms) == len(STACKS[name])
    assert compiled.report.proof["transforms"] < 1e-4
    assert compiled.report.quality["program_to_onnx_error"] < 0.02
    assert compiled.report.quality["program_to_float_error"] < 0.2


LEARNED = ("spinquant", "ostquant", "flatquant", "affinequant", "omniquant")


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_recipe_reaches_the_program(tmp_path, name):
    """Formats and solver of the recipe (of quarot where a method has no recipe of its own), in groups of 8."""
    base = name if name in {recipe.name for recipe in list_recipes()} else "quarot"
    file = tmp_path / "recipe.toml"
    step = f'{{ name = "{name}", steps = 2, batch = 1 }}'
    file.write_text(f'base = "{base}"\nweight = "int4/g8/asym"\ntransforms = [{step}]\n')
    model = miniatures.model("llama")
    feeds = [random_inputs(model, np.random.default_rng(i)) for i in range(3)]
    compiled = qcompile.compile(model, recipe=str(file), calibration=feeds, output=tmp_path / "out", progress=False)
    assert len(compiled.report.transforms) == 1
    assert {record.weight_format for record in compiled.report.layers if record.kind == "linear"} == {"int4/g8/asym"}
    assert compiled.report.proof["transforms"] < 1e-4
    assert compiled.report.quality["program_to_float_error"] < 0.8
