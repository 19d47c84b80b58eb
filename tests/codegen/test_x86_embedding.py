"""Embedding lookups: quantized and float tables, sums with norms, ids out of range."""

import numpy as np
import pytest

from qcompile.codegen.kernels.cpu.embedding import Embedding, Table
from qcompile.codegen.kernels.x86.harness import TARGETS, run
from qcompile.errors import TargetError
from qcompile.targets.target import Target


def arguments(kernel: Embedding, m: int) -> list[np.ndarray]:
    rng = np.random.default_rng(m)
    made = []
    for param in kernel.params:
        shape = tuple(m if e == "M" else e for e in param.shape)
        if param.name.startswith("ids"):
            size = kernel.tables[int(param.name[3:])].size
            made.append(rng.integers(-size, size, shape).astype(param.dtype))
        elif param.dtype == "int8":
            made.append(rng.integers(-127, 128, shape).astype("int8"))
        elif not param.output:
            made.append(rng.uniform(0.01, 1, shape).astype("float32"))
    return made


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("width", [1, 13, 64, 384])
def test_one_quantized_table_is_exact(width: int, target: Target) -> None:
    for dtype in ("int64", "int32"):
        kernel = Embedding(width, tables=(Table(50),), ids_dtype=dtype)
        args = arguments(kernel, 33)
        np.testing.assert_array_equal(run(kernel, target, {"M": 33}, *args)["y"], kernel.reference(*args)["y"])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sum_of_tables_with_norm_and_quantizer(target: Target) -> None:
    tables = (Table(50), Table(9, quantized=False), Table(2))
    kernel = Embedding(37, norm="layer", quantize="token", tables=tables)
    args = arguments(kernel, 20)
    got, want = run(kernel, target, {"M": 20}, *args), kernel.reference(*args)
    np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-5)
    codes, scale = kernel.quantized(got["y"])
    np.testing.assert_array_equal(got["codes"], codes)
    np.testing.assert_array_equal(got["scale"], scale)


def test_codes_without_the_float_rows() -> None:
    kernel = Embedding(24, f32_output=False, quantize="token", tables=(Table(7), Table(5)))
    args = arguments(kernel, 11)
    got, want = run(kernel, TARGETS[0], {"M": 11}, *args), kernel.reference(*args)
    np.testing.assert_allclose(got["scale"], want["scale"], rtol=1e-6)
    assert np.abs(got["codes"].astype(int) - want["codes"]).max() <= 1


@pytest.mark.parametrize("wrong", [-51, 50, 1 << 40])
@pytest.mark.parametrize("cores", [1, 4])
def test_ids_out_of_range_raise(wrong: int, cores: int) -> None:
    kernel = Embedding(8, tables=(Table(50),))
    table, scale, ids = arguments(kernel, 5000)
    ids[4321] = wrong
    target = Target("x86", TARGETS[0].cpu, TARGETS[0].features, cores)
    with pytest.raises(IndexError, match="outside of the table"):
        run(kernel, target, {"M": 5000}, table, scale, ids)


def test_refuses_no_tables() -> None:
    with pytest.raises(TargetError):
        Embedding(8)
