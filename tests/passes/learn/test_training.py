"""Training: it helps, ends in time, is the same every time, and says what it lacks."""

import dataclasses
import itertools

import networks
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.errors import CalibrationError, RecipeError
from qcompile.passes.asks import apply_asks
from qcompile.passes.blocks import blocks
from qcompile.passes.execute import run
from qcompile.passes.learn import AffineQuant, FlatQuant, OmniQuant, OSTQuant, SpinQuant, training
from qcompile.passes.learn.base import silent
from qcompile.passes.learn.stiefel import Cayley, nearest_orthogonal
from qcompile.passes.quantize import CLIP
from qcompile.passes.spaces import analyse

pytestmark = pytest.mark.filterwarnings("ignore")
FAST = {"steps": 25, "batch": 2, "rotation_rate": 0.03, "rate": 0.03}
METHODS = {
    "spinquant": SpinQuant(**FAST),
    "ostquant": OSTQuant(**FAST),
    "flatquant": FlatQuant(**FAST),
    "affinequant": AffineQuant(**FAST),
    "omniquant": OmniQuant(**FAST),
}


def simulated_error(program, feeds: list[dict]) -> float:
    """Squared error of the output with everything rounded, relative to its size."""
    with torch.no_grad():
        step = program.step()
        pairs = [(program.run(None, f, ["y"])["y"], program.run(step, f, ["y"])["y"]) for f in feeds]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.mark.parametrize("name", ["spinquant", "ostquant", "omniquant"])
def test_training_reduces_the_error(name):
    """End to end or block by block, against its own start, on the samples it learns from."""
    ask = METHODS[name]
    model = networks.normed() if name == "omniquant" else networks.residual()
    feeds = networks.feeds(model)
    context = networks.context(model, feeds)
    program = ask.program(context)
    before = simulated_error(program, feeds)
    ask._train(program, context, feeds)
    assert simulated_error(program, feeds) < 0.9 * before


def test_every_block_learns():
    """Block by block, the loss falls on every block."""
    model = networks.residual()
    feeds = networks.feeds(model)
    context = networks.context(model, feeds)
    ask = FlatQuant(rotation_rate=0.01, rate=0.01, clip_weights=True)
    program = ask.program(context)
    schedule = training.Schedule(80, None, 2, ask.rotation_rate, ask.rate)
    parts = blocks(context.model, program.sites.keys())
    outcomes = training.train_blocks(program, feeds, parts, schedule, silent, "test")
    assert len(outcomes) == len(parts) > 1
    assert all(o.after < o.before and o.steps == 80 for o in outcomes), outcomes


def test_the_result_is_the_same_every_time_and_depends_on_the_seed():
    """Parameters bit by bit."""
    model = networks.residual()
    feeds = networks.feeds(model)
    found = []
    for seed in (0, 0, 1):
        ask = dataclasses.replace(METHODS["ostquant"], steps=5, seed=seed)
        context = networks.context(model, feeds)
        program = ask.program(context)
        ask._train(program, context, feeds)
        found.append(torch.cat([t.detach().reshape(-1) for t in program.parameters().values()]))
    assert bool((found[0] == found[1]).all())
    assert not bool((found[0] == found[2]).all())


@pytest.mark.parametrize("blockwise", [False, True])
def test_the_time_budget_ends_a_training(monkeypatch, blockwise):
    """By a clock that moves one second whenever it is read; blocks share the budget."""
    ticks = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(ticks)))
    model = networks.residual()
    feeds = networks.feeds(model)
    ask = FlatQuant(steps=100000, seconds=40, blockwise=blockwise)
    context = networks.context(model, feeds)
    program = ask.program(context)
    lines = []

    class Stage:
        def __call__(self, title, total):
            return self

        def __enter__(self):
            return lines.append

        def __exit__(self, *exception):
            return None

    context.data.stage = Stage()
    ask._train(program, context, feeds)
    assert 5 < len(lines) < 40
    assert lines[-1].startswith("loss ")


@pytest.mark.parametrize("name", METHODS)
def test_without_samples_the_error_says_what_to_do(name):
    """Not skipped: a recipe that wants to learn cannot be followed without data."""
    model = networks.residual()
    context = networks.context(model, networks.feeds(model))
    with pytest.raises(CalibrationError, match=f"{name} learns from calibration samples.*--calibration"):
        apply_asks(None, context.spaces, [METHODS[name]], None, context.quantized)


def test_wrong_options_are_refused():
    """Before anything is trained."""
    for options, text in (({"steps": 0}, "steps"), ({"seconds": -1.0}, "seconds"), ({"batch": 0}, "batch")):
        with pytest.raises(RecipeError, match=text):
            SpinQuant(**options)
    model = networks.residual()
    context = networks.context(model, networks.feeds(model))
    for ask, text in ((SpinQuant(loss="cosine"), "cosine"), (SpinQuant(device="abacus"), "abacus")):
        with pytest.raises(RecipeError, match=text):
            apply_asks(None, context.spaces, [ask], context.data, context.quantized)


def test_what_was_learned_can_be_kept_in_a_file(tmp_path):
    """Read back, it makes the same model; a file of another method is refused by name."""
    model = networks.residual()
    feeds = networks.feeds(model)
    ask = dataclasses.replace(METHODS["ostquant"], steps=3, store=str(tmp_path / "learned.safetensors"))
    outputs = []
    for _ in range(2):
        context = networks.context(model, feeds)
        changed, report = apply_asks(None, context.spaces, [ask], context.data, context.quantized)
        outputs.append(run(changed, feeds[0], ["h1"])["h1"])
    assert "read from" in str(report)
    assert bool((outputs[0] == outputs[1]).all())
    other = SpinQuant(store=ask.store)
    context = networks.context(model, feeds)
    with pytest.raises(RecipeError, match="another method"):
        apply_asks(None, context.spaces, [other], context.data, context.quantized)


def test_the_learned_clipping_reaches_the_quantizer():
    """As metadata of the activation that is rounded, also behind an operator at run time."""
    model = networks.residual()
    feeds = networks.feeds(model)
    context = networks.context(model, feeds)
    changed, _ = apply_asks(None, context.spaces, [FlatQuant(**FAST)], context.data, context.quantized)
    rounded = {n.inputs[0] for n in changed.graph if n.op_type == "MatMul" and n.inputs[0].name.endswith("mixed")}
    assert len(rounded) == 4
    assert all(0 < float(v.metadata_props[CLIP]) < 1 for v in rounded)


def test_blocks_end_where_one_value_is_left():
    """The residual stream after every addition; what nobody learns in belongs to no block."""
    model = analyse(networks.residual(layers=3)).model
    sites = {n.name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].name not in ("we", "head")}
    found = blocks(model, sites)
    borders = [b.target for b in found]
    assert {"r2", "r3"} <= set(borders)
    assert all(set(b.nodes) & sites for b in found)
    assert [b.source for b in found] == ["", *borders[:-1]]
    joined = blocks(model, sites, span=2)
    assert len(joined) == -(-len(found) // 2)
    assert set().union(*(b.nodes for b in found)) >= sites


def test_samples_are_joined_along_a_batch_axis_only():
    """A fixed first dimension is no batch axis."""
    model = networks.residual()
    feeds = networks.feeds(model, 2)
    assert len(training.stacked(model, feeds)) == 2
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        value.shape = ir.Shape(["batch", networks.WIDTH])
    (joined,) = training.stacked(model, feeds)
    np.testing.assert_array_equal(joined["x"], np.concatenate([f["x"] for f in feeds]))


@pytest.mark.parametrize("adaptive", [0.0, 0.99])
def test_cayley_steps_solve_the_procrustes_problem_on_the_manifold(adaptive):
    """min |R A - B| over orthogonal R has the polar factor of B A^T as its solution."""
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.standard_normal((6, 30)))
    target = nearest_orthogonal(torch.from_numpy(rng.standard_normal((6, 6))))
    if torch.linalg.det(target) < 0:
        target[0] *= -1
    b = target @ a
    r = torch.eye(6, dtype=torch.float64, requires_grad=True)
    optimizer = Cayley([r], lr=0.05 if adaptive else 0.002, adaptive=adaptive)
    for step in range(400):
        optimizer.zero_grad()
        (r @ a - b).square().sum().backward()
        optimizer.param_groups[0]["lr"] *= 0.99 if step > 200 else 1
        optimizer.step()
        assert float((r.mT @ r - torch.eye(6)).abs().max()) < 1e-6
    assert float((r - target).abs().max()) < 1e-2


def test_samples_held_out_choose_the_parameters():
    """A step length that spoils everything: the start is kept; and a better one replaces it."""
    model = networks.residual()
    feeds = networks.feeds(model) * 4
    ask = dataclasses.replace(METHODS["spinquant"], steps=8, batch=4, holdout=0.2)
    for rate, better in ((50.0, False), (0.02, True)):
        program = ask.program(networks.context(model, feeds))
        start = [t.detach().clone() for t in program.parameters().values()]
        schedule = training.Schedule(8, None, 4, rate, rate, holdout=0.2)
        assert all(set(schedule.divide(n)[0]).isdisjoint(schedule.divide(n)[1]) for n in (1, 19, 20, 64, 1000))
        outcome = training.train(program, feeds, schedule, "auto", silent, "test")
        assert outcome.held is not None and outcome.held[1] <= outcome.held[0]
        kept = all(bool((a == b).all()) for a, b in zip(start, program.parameters().values()))
        assert kept is not better


def test_weights_are_rounded_in_training_only_where_the_solver_rounds_each_by_itself():
    """Unless the option says otherwise."""
    model = networks.residual()
    feeds = networks.feeds(model)
    for compensated, option, rounds in (
        (False, None, True),
        (True, None, False),
        (True, True, True),
        (False, False, False),
    ):
        context = networks.context(model, feeds)
        context.quantized = {w: dataclasses.replace(p, compensated=compensated) for w, p in context.quantized.items()}
        program = dataclasses.replace(METHODS["spinquant"], round_weights=option).program(context)
        made = program.step().rounded
        program.simulate = (True, False)
        exact = program.step().rounded
        assert all(bool((made[name] != exact[name]).any()) is rounds for name in made)
