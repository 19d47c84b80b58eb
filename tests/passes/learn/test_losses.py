"""Losses of trainings, against their definitions in numpy."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.passes.learn.losses import TOP, choose, kl, kl_top, mse


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(classes: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    exact = 3 * torch.randn((rows, classes), generator=generator, dtype=torch.float64)
    return exact, exact + torch.randn(exact.shape, generator=generator, dtype=torch.float64)


def test_kl_is_the_mean_divergence_of_rows():
    exact, rounded = logits(17)
    p, q = softmax(exact.numpy()), softmax(rounded.numpy())
    assert float(kl(exact, rounded)) == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert float(kl(exact, exact)) == 0


def test_kl_top_compares_the_likely_classes_alone_and_renormalises_both():
    exact, rounded = logits(TOP + 300)
    likely = np.argsort(-exact.numpy(), -1)[:, :TOP]
    p, q = (softmax(np.take_along_axis(t.numpy(), likely, -1)) for t in (exact, rounded))
    assert float(kl_top(exact, rounded)) == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert float(kl_top(exact, rounded)) != pytest.approx(float(kl(exact, rounded)), rel=1e-6)
    few = logits(TOP)
    assert float(kl_top(*few)) == float(kl(*few))


def test_what_happens_in_the_tail_does_not_move_kl_top():
    exact, rounded = logits(TOP + 300)
    tail = torch.from_numpy(np.argsort(-exact.numpy(), -1)[:, TOP:].copy())
    moved = rounded.scatter(-1, tail, 7.0)
    assert float(kl_top(exact, moved)) == float(kl_top(exact, rounded))
    assert float(kl(exact, moved)) > float(kl(exact, rounded))


def test_mse_is_relative_to_the_exact_result():
    exact, rounded = logits(8)
    expected = ((rounded - exact) ** 2).sum() / (exact**2).sum()
    assert float(mse(exact, rounded)) == pytest.approx(float(expected))
    assert float(mse(10 * exact, 10 * rounded)) == pytest.approx(float(expected))


@pytest.mark.parametrize(("width", "loss"), [(40, kl), (6, mse)])
def test_the_loss_is_chosen_by_whether_the_result_widens(width, loss):
    """More classes than channels: logits; else hidden states."""
    x = ir.Value(name="x", shape=ir.Shape([3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(np.zeros((8, width), np.float32), name="w"))
    w.shape = ir.Shape([8, width])
    node = ir.node("MatMul", [x, w])
    assert choose("auto", node.outputs[0]) is loss
    assert choose("kl-top", node.outputs[0]) is kl_top
    with pytest.raises(RecipeError, match="cross"):
        choose("cross", node.outputs[0])
