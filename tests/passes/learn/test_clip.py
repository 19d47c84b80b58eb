"""The searched clipping of tokens, and what the quantizer makes of it."""

import networks
import numpy as np
import pytest

from qcompile.errors import RecipeError
from qcompile.formats import parse_activation
from qcompile.passes.asks import ClipTokens, apply_asks
from qcompile.passes.domain import add_functions
from qcompile.passes.execute import run
from qcompile.passes.quantize import CLIP, Quantizer

pytestmark = pytest.mark.filterwarnings("ignore")


def shares(activation: str, **options) -> dict[str, float]:
    """What is chosen for every activation."""
    model = networks.residual()
    where = networks.context(model, networks.feeds(model), activation=activation)
    changed, _ = apply_asks(None, where.spaces, [ClipTokens(**options)], where.data, where.quantized)
    values = [v for n in changed.graph for v in n.outputs]
    return {v.name: float(v.metadata_props[CLIP]) for v in values if CLIP in v.metadata_props}


def test_fewer_bits_are_clipped_more():
    """Every rounded activation gets a share; eight bits keep nearly everything."""
    few, many = shares("int3/token"), shares("int8/token")
    assert set(few) == set(many) == {"n0", "h0", "n1", "h1"}
    assert np.mean(list(few.values())) < np.mean(list(many.values()))


def test_a_fixed_share_needs_no_data():
    """As QuaRot does it."""
    assert set(shares("int4/token", share=0.9).values()) == {0.9}


def test_without_samples_the_search_is_refused_with_a_reason():
    """It is in the report, and the model stays."""
    model = networks.residual()
    where = networks.context(model, networks.feeds(model))
    changed, report = apply_asks(None, where.spaces, [ClipTokens()], None, where.quantized)
    assert changed is where.model
    assert "no calibration samples" in str(report)


def test_wrong_shares_are_refused():
    """Nothing and more than everything."""
    for options in ({"lowest": 0.0}, {"share": 1.5}, {"steps": 0}):
        with pytest.raises(RecipeError, match="clip"):
            ClipTokens(**options)


def test_the_quantizer_in_the_graph_clips():
    """QuantizePerToken with its attribute computes what the format says, in a graph."""
    model = networks.residual()
    fmt = parse_activation("int4/token")
    value = next(v for n in model.graph for v in n.outputs if v.name == "n0")
    value.metadata_props[CLIP] = "0.75"
    reader = next(use.node for use in value.uses())
    out = Quantizer(model).activation(value, fmt, reader)
    add_functions(model)
    feed = networks.feeds(model)[0]
    found = run(model, feed, ["n0", out.name], dtype="float32")
    np.testing.assert_allclose(found[out.name].numpy(), fmt.round(found["n0"].numpy(), clip=0.75), rtol=1e-5, atol=1e-6)
