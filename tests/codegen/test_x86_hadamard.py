"""Rotations fused into the row kernels equal the matrix product."""

import numpy as np
import pytest

from qcompile.codegen.kernels.cpu.rowwise import Rowwise
from qcompile.codegen.kernels.x86.harness import TARGETS, run
from qcompile.errors import TargetError
from qcompile.formats.hadamard import hadamard_matrix


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    ("width", "block"),
    [
        (1, 1),
        (2, 2),
        (12, 4),
        (24, 8),
        (48, 16),
        (60, 12),
        (60, 20),
        (96, 32),
        (88, 44),
        (384, 128),
        (384, 384),
        (256, 256),
        (108, 108),
        (216, 108),
        (1408, 1408),
    ],
)
def test_rotation_before_the_quantizer(target, width, block):
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    x[:, 0] *= 30
    x[3] = 0
    kernel = Rowwise(width, hadamard=block)
    got = run(kernel, target, {"M": 5}, x)
    want = (x.reshape(5, -1, block).astype(np.float64) @ hadamard_matrix(block)).reshape(5, width)
    scale = np.abs(want).max(1) / 127
    np.testing.assert_allclose(got["scale"], np.where(scale == 0, 1, scale), rtol=1e-5)
    back = (got["codes"].astype(np.float64) - 128) * got["scale"][:, None]
    assert (np.abs(back - want) <= 0.501 * got["scale"][:, None] + 1e-6).all()


def test_the_float_output_is_not_rotated():
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    kernel = Rowwise(64, norm="rms", gamma=False, f32_output=True, hadamard=32)
    got, want = run(kernel, TARGETS[0], {"M": 3}, x), kernel.reference(x)
    np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-6)
    assert np.abs(got["codes"].astype(int) - want["codes"].astype(int)).max() <= 1
    np.testing.assert_allclose(got["scale"], want["scale"], rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("order", [0, 12])
@pytest.mark.parametrize(
    "options", [{}, {"norm": "layer"}, {"norm": "rms", "f32_output": True}, {"gated": True}], ids=str
)
def test_a_factor_acts_between_the_row_and_its_rotation(target, order, options):
    """The float output is the row without it."""
    rng = np.random.default_rng(1)
    kernel = Rowwise(60, factor=True, hadamard=order, **options)
    x = rng.standard_normal((7, 120 if kernel.gated else 60)).astype(np.float32)
    vectors = {"gamma": rng.uniform(0.5, 2, 60), "beta": rng.standard_normal(60), "factor": rng.uniform(-2, 2, 60)}
    given = [vectors[p.name].astype(np.float32) for p in kernel.params if p.name in vectors]
    got, want = run(kernel, target, {"M": 7}, x, *given), kernel.reference(x, *given)
    if kernel.f32_output:
        np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-6)
    plain = Rowwise(60, **options).reference(x, *given[:-1])["y"].astype(np.float64) * vectors["factor"]
    matrix = hadamard_matrix(order) if order else np.eye(60)
    rotated = (plain.reshape(7, -1, len(matrix)) @ matrix).reshape(7, 60)
    np.testing.assert_allclose(got["scale"], np.abs(rotated).max(1) / 127, rtol=1e-5)
    back = (got["codes"].astype(np.float64) - 128) * got["scale"][:, None]
    assert (np.abs(back - rotated) <= 0.501 * got["scale"][:, None] + 1e-6).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("width", "sizes"), [(6, (2, 3)), (60, (3, 20)), (60, (5, 6)), (88, (1, 44)), (352, (8, 44))])
def test_kronecker_products_of_any_matrices(target, width, sizes):
    """Blocks smaller than the row, rows and columns that fill no tile; the float output stays as it is."""
    rng = np.random.default_rng(2)
    kernel = Rowwise(width, factor=True, kronecker=sizes, f32_output=True)
    x = rng.standard_normal((5, width)).astype(np.float32)
    factor, left, right = (rng.standard_normal(s).astype(np.float32) for s in (width, (sizes[0],) * 2, (sizes[1],) * 2))
    got = run(kernel, target, {"M": 5}, x, factor, left, right)
    np.testing.assert_array_equal(got["y"], x)
    product = np.kron(left.astype(np.float64), right)
    want = ((x * factor).astype(np.float64).reshape(5, -1, len(product)) @ product).reshape(5, width)
    np.testing.assert_allclose(got["scale"], np.abs(want).max(1) / 127, rtol=1e-4)
    back = (got["codes"].astype(np.float64) - 128) * got["scale"][:, None]
    assert (np.abs(back - want) <= 0.502 * got["scale"][:, None] + 1e-6).all()


def test_a_product_and_a_rotation_exclude_each_other():
    for options in ({"hadamard": 4, "kronecker": (2, 2)}, {"kronecker": (3, 5)}, {"kronecker": (4, 0)}):
        with pytest.raises(TargetError, match="Kronecker"):
            Rowwise(8, **options)
