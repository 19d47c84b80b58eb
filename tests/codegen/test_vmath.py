"""Vector math helpers against numpy in float64."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf

pytest.importorskip("tvm")

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qcompile.codegen.kernels.base import ACTIVATIONS
from qcompile.codegen.kernels.cpu import vmath

CPUS = {8: "x86-64-v3", 16: "x86-64-v4"}


def compiled(f, lanes):
    """``y[i] = f(x[i])`` over vectors of ``lanes``, as a Python function."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("apply")
        n = T.int32()
        x = T.match_buffer(T.arg("x", T.handle()), (n,), "float32", align=4)
        y = T.match_buffer(T.arg("y", T.handle()), (n,), "float32", align=4)
        with T.serial(n // lanes) as i:
            T.buffer_store(y, f(x.vload([i * lanes], f"float32x{lanes}")), [T.ramp(i * lanes, 1, lanes)])
    module = tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm", "mcpu": CPUS[lanes]}))

    def run(values):
        out = np.full_like(values, np.float32(-77))
        module["apply"](values, out)
        return out

    return run, module.mod.inspect_source("asm")


@pytest.fixture(params=[8, 16])
def lanes(request):
    if request.param == 16 and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX-512")
    return request.param


def grid(low, high):
    """Dense values in [low, high], and a logarithmic approach to zero from both sides."""
    tiny = np.logspace(-30, 0, 1000)
    x = np.concatenate([np.linspace(low, high, 20000 - 2000), tiny, -tiny]).astype(np.float32)
    return np.clip(x, low, high)


@pytest.mark.parametrize(
    "name, function, low, high",
    [
        ("exp", np.exp, -87.3, 88.7),
        ("erf", erf, -12, 12),
        ("tanh", np.tanh, -30, 30),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), -87, 88),
    ],
)
def test_relative_error_is_below_one_millionth(name, function, low, high, lanes):
    run, asm = compiled(getattr(vmath, name), lanes)
    x = grid(low, high)
    np.testing.assert_allclose(run(x), function(x.astype(np.float64)), rtol=1e-6, atol=0)
    assert "fmadd" in asm and "expf" not in asm, "the function must stay in vector registers"


def test_limits_and_nan(lanes):
    x = np.array([-np.inf, -3e38, -90, 0, 90, 3e38, np.inf, np.nan] * 2, np.float32)
    for name, expected in {
        "exp": [0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan],
        "erf": [-1, -1, -1, 0, 1, 1, 1, np.nan],
        "tanh": [-1, -1, -1, 0, 1, 1, 1, np.nan],
        "sigmoid": [0, 0, 0, 0.5, 1, 1, 1, np.nan],
    }.items():
        run, _ = compiled(getattr(vmath, name), lanes)
        np.testing.assert_array_equal(run(x), np.array(expected * 2, np.float32), err_msg=name)


@pytest.mark.parametrize("name", ["", "relu", "gelu", "gelu_tanh", "silu"])
def test_activations_match_their_definition(name, lanes):
    run, _ = compiled(vmath.ACTIVATIONS[name], lanes)
    x = grid(-40, 40)
    expected = ACTIVATIONS[name](x.astype(np.float64))
    assert np.abs(run(x) - expected).max() <= 1e-6 * np.maximum(np.abs(expected), 1).max()
    near = np.abs(x) < 1
    np.testing.assert_allclose(run(x)[near], expected[near], rtol=2e-6, atol=1e-30)
