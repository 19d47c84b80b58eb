"""Learned elements: gradients through the engine, membership in their groups, functions preserved."""

import exact
import networks
import numpy as np
import pytest
import torch

from qcompile.passes.execute import run
from qcompile.passes.learn import AffineQuant, FlatQuant, OmniQuant, OSTQuant, SpinQuant
from qcompile.passes.learn.stiefel import cayley
from qcompile.passes.spaces import analyse
from qcompile.passes.spaces.prove import run_folded

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = [SpinQuant(), OSTQuant(), FlatQuant(), FlatQuant(orthogonal=True), AffineQuant(), OmniQuant()]
NAMES = ["spinquant", "ostquant", "flatquant", "flatquant-orthogonal", "affinequant", "omniquant"]


def disturb(program, size: float = 0.3) -> None:
    """Move every parameter away from where it starts, within its manifold."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in [*program.freedoms, *program.mixings.values()]:
            part.progress(1.0) if hasattr(part, "progress") else None
            for t in part.parameters.orthogonal:
                d = torch.randn(t.shape, generator=generator, dtype=t.dtype) * size
                t.copy_(cayley(d - d.mT) @ t)
            for t in part.parameters.free:
                t.add_(torch.randn(t.shape, generator=generator, dtype=t.dtype) * size)
        for t in program.shifts.values():
            t.add_(torch.randn(t.shape, generator=generator, dtype=t.dtype) * size)


def loss(program, feed: dict) -> torch.Tensor:
    """The output error if a smooth function takes the place of rounding; gradients reach the parameters."""
    program.simulate = (False, False)
    step = program.step()
    step.rounded = {k: w + 0.1 * torch.sin(5 * w) for k, w in step.rounded.items()}
    leaves = step.detached()
    exact_y = program.run(None, feed, ["y"])["y"]
    value = (program.run(leaves, feed, ["y"])["y"] - exact_y).square().mean()
    if value.requires_grad:
        value.backward()
        step.backward(leaves)
    return value.detach()


@pytest.mark.parametrize("ask", METHODS, ids=NAMES)
def test_gradients_match_finite_differences(ask):
    """The directional derivative along every kind of parameter, taken on its manifold."""
    model = networks.normed() if isinstance(ask, OmniQuant) else networks.residual()
    feeds = networks.feeds(model)
    program = networks.program(ask, networks.context(model, feeds))
    disturb(program)
    loss(program, feeds[0])
    generator = torch.Generator().manual_seed(1)
    h = 1e-5
    parts = [*program.freedoms, *program.mixings.values()]
    kinds = [(t, True) for p in parts for t in p.parameters.orthogonal]
    kinds += [(t, False) for p in parts for t in p.parameters.free] + [(t, False) for t in program.shifts.values()]
    assert kinds
    gradients = [t.grad.clone() for t, _ in kinds]
    for (t, orthogonal), gradient in zip(kinds, gradients):
        direction = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        if orthogonal:
            direction = (direction - direction.mT) / 2
        kept = t.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                t.copy_(cayley(-sign * h * direction) @ kept if orthogonal else kept + sign * h * direction)
            values.append(float(loss(program, feeds[0])))
        with torch.no_grad():
            t.copy_(kept)
        tangent = direction @ kept if orthogonal else direction
        measured = (values[0] - values[1]) / (2 * h)
        assert float((gradient * tangent).sum()) == pytest.approx(measured, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("ask", METHODS, ids=NAMES)
def test_function_is_preserved(ask):
    """Whatever the parameters are: in float64 to 1e-10, simulated without rounding and finished."""
    model = exact.widen(networks.normed() if isinstance(ask, OmniQuant) else networks.residual())
    feeds = networks.feeds(model)
    program = networks.program(ask, networks.context(model, feeds))
    disturb(program)
    program.simulate = (False, False)
    before = run(program.model, feeds[0])["y"]
    with torch.no_grad():
        simulated = program.run(program.step(), feeds[0], ["y"])["y"]
    after = run(program.finish(), feeds[0])["y"]
    for y in (simulated, after):
        assert float((y - before).abs().max() / before.abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_function_of_a_decoder_is_preserved(name):
    """Heads that share keys, biases, tied pairs, LayerNorms: rotations and scales together, in float64."""
    case = exact.Case.of(name, recognised=True)
    from qcompile.passes.asks import Context

    program = networks.program(OSTQuant(), Context(case.spaces, case.data))
    assert program.freedoms
    disturb(program)
    folded = run_folded(program.spaces, program.element(), case.feeds)
    error = max(float((a - folded[n]).abs().max() / a.abs().max()) for n, a in case.exact.items())
    assert error <= 1e-10


@pytest.mark.parametrize(
    ("ask", "freedoms", "mixings", "shifts"),
    [
        (SpinQuant(), {"Rotation"}, {"FixedHadamard"}, False),
        (SpinQuant(online=False), {"Rotation"}, set(), False),
        (OSTQuant(), {"Rotation", "Scales"}, {"FixedHadamard"}, False),
        (FlatQuant(), {"Linear", "Scales"}, {"LearnedKronecker"}, False),
        (FlatQuant(heads=False), {"Scales"}, {"LearnedKronecker"}, False),
        (AffineQuant(), {"Dominant", "Scales"}, set(), False),
        (OmniQuant(), {"Scales"}, set(), True),
        (OmniQuant(shift=False), {"Scales"}, set(), False),
    ],
    ids=lambda v: v.name if hasattr(v, "name") else "",
)
def test_a_method_learns_what_its_paper_says(ask, freedoms, mixings, shifts):
    """On a decoder with LayerNorms and biases, which has room for all of it."""
    from qcompile.passes.asks import Centre, Context, apply_asks

    case = exact.Case.of("opt", recognised=True)
    model, _ = apply_asks(None, case.spaces, [Centre()], case.data)
    case = exact.Case(model, case.feeds)
    program = networks.program(ask, Context(case.spaces, case.data))
    assert {type(f).__name__ for f in program.freedoms} == freedoms
    assert {type(m).__name__ for m in program.mixings.values()} == mixings
    assert bool(program.shifts) == shifts
    if "LearnedKronecker" in mixings:
        assert program.mixings.keys() == {s.activation for s in program.sites.values()}
    if "Rotation" in freedoms:
        assert sum(type(f).__name__ == "Rotation" for f in program.freedoms) == 3, "stream, values of two layers"


def test_elements_stay_in_their_groups():
    """Parameters learned in float32 and never exact: what is folded is in the group to 1e-12."""
    model = networks.residual()
    feeds = networks.feeds(model)
    ask = OSTQuant(steps=20, rotation_rate=0.05)
    context = networks.context(model, feeds)
    program = ask.program(context)
    ask._train(program, context, feeds)
    element = program.element()
    spaces = program.spaces
    assert element.blocks
    for cell, matrix in element.blocks.items():
        assert spaces.solution.block(cell).contains(matrix, 1e-10)
        assert np.abs(matrix.T @ matrix - np.eye(len(matrix))).max() <= 1e-10
    logs = element.log[element.log != 0]
    assert logs.size and np.isfinite(logs).all()


def test_scales_of_tied_spaces_move_along():
    """A scale of the product of two projections is one of the linear projection; the gate's stays."""
    model = networks.residual(layers=1)
    program = networks.program(OSTQuant(online=False), networks.context(model, networks.feeds(model)))
    disturb(program)
    spaces, element = program.spaces, program.element()
    up, product = spaces.of("u0"), spaces.of("h0")
    np.testing.assert_allclose(element.log[up.classes], element.log[product.classes])
    assert np.abs(element.log[product.classes]).min() > 0
    assert not element.log[spaces.of("s0").classes].any()


def test_only_what_is_quantized_is_touched():
    """No reader is quantized: nothing is learned, and the report says so."""
    from qcompile.passes.asks import apply_asks

    model = networks.residual()
    context = networks.context(model, networks.feeds(model))
    changed, report = apply_asks(None, context.spaces, [SpinQuant()], context.data, {})
    assert changed is context.model
    assert [e.text for e in report.entries] == ["no linear operator is quantized"]


def test_online_operators_run_in_stock_form():
    """The finished graph holds Kronecker operators whose bodies compute what was simulated."""
    model = networks.residual()
    feeds = networks.feeds(model)
    program = networks.program(FlatQuant(), networks.context(model, feeds))
    disturb(program)
    finished = program.finish()
    operators = [n for n in finished.graph if n.op_type == "Kronecker"]
    assert len(operators) == len(program.mixings) == 4
    name = "n1"
    x = run(finished, feeds[0], [next(n for n in operators if n.inputs[0].name == name).outputs[0].name])
    inner = run(finished, feeds[0], [name])[name]
    with torch.no_grad():
        simulated = program.mixings[name].forward(inner)
    np.testing.assert_allclose(next(iter(x.values())).numpy(), simulated.numpy(), rtol=1e-5, atol=1e-5)
    assert analyse(finished) is not None
