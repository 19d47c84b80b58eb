"""Weights of 5 to 8 bits that are no integers: small floats, and tables of 32 to 256 levels, against numpy."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

import tvm

from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cpu.levels import adds_halves, exact_levels
from qcompile.codegen.kernels.cpu.minifloats import half_bits, half_shift
from qcompile.formats import list_formats, parse_activation, parse_format
from qcompile.targets import get_target, x86

FLOATS = ["e4m3/g32", "e5m2", "mxfp6", "mxfp8", "e2m3/g20", "e3m3/g7", "e4m2", "e2m2/g16"]
"""Formats whose codes are bits of a float16."""
TABLES = ["nf5/g32", "nf6", "nf7/g20", "nf8/g64", "pow2sum2/g32", "pow2sum2", "e5m1/g40"]

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@functools.lru_cache(maxsize=8)
def compiled(family, problem, config, target):
    return tvm.compile(family.build(problem, dict(config), target, "gemm"), target=target.tvm())["gemm"]


def check(rng, family, problem, rows):
    """The kernel of a small tile against the reference, with activations that reach both ends."""
    config = family.configs(problem, x86.AVX2)[0]
    config = {**config, "mr": min(config["mr"], 2), "vectors": int(rng.integers(1, 3)), "scales": "float32"}
    weight = problem.weight.encode(rng.normal(size=(problem.k, problem.n)).astype(np.float32))
    unused = [] if not hasattr(problem.weight, "table") else np.flatnonzero(np.isnan(problem.weight.table))
    codes = rng.integers(0, 1 << problem.weight.bits, weight.codes.shape).astype(np.uint8)  # all there are
    weight.codes[...] = np.where(np.isin(codes, unused), weight.codes, codes)
    packed = family.pack(problem, config, weight)
    for m in rows:
        if problem.activation.bits:
            x = rng.choice(np.array([0, 1, 77, 128, 200, 255], np.uint8), (m, problem.k))
            scale = rng.uniform(0.01, 1, m).astype(np.float32)
        else:
            x, scale = rng.normal(size=(m, problem.k)).astype(np.float32), None
        bias = rng.normal(size=problem.n).astype(np.float32)
        out = np.full((m, problem.n), np.nan, np.float32)
        arguments = [a for a in (x, scale, *packed.values(), bias, out) if a is not None]
        compiled(family, problem, tuple(config.items()), x86.AVX2)(*arguments)
        expected = family.reference(problem, x, scale, weight, bias)
        w = np.abs(problem.weight.decode(weight).astype(np.float64))
        magnitude = np.abs(x - (128.0 if scale is not None else 0.0)) @ w * (1 if scale is None else scale[:, None])
        exact = family.name != "x86-table16" or exact_levels(problem.weight, 32767) is not None
        largest = w.max() * 255 * problem.k * (1 if scale is None else scale[:, None])
        tolerance = 2e-6 * (magnitude + 1) + (0 if exact else largest / 65000)
        assert (np.abs(out - expected) <= tolerance).all(), (family.name, config, m)


@FEW
@given(
    spelling=st.sampled_from(FLOATS + TABLES),
    activation=st.sampled_from(["int8/token", "int8/tensor", "none"]),
    k=st.one_of(st.integers(1, 9), st.integers(10, 150)),
    n=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_every_family_matches_the_reference(spelling, activation, k, n, seed):
    rng = np.random.default_rng(seed)
    problem = LinearProblem(k, n, parse_format(spelling), parse_activation(activation), Epilogue(bias=True))
    able = [family for family in families("x86") if family.supports(problem, x86.AVX2)]
    assert able
    for family in able:
        check(rng, family, problem, (1, 3))


@pytest.mark.parametrize("spelling", FLOATS)
def test_small_floats_are_decoded_without_rounding(spelling):
    fmt = parse_format(spelling)
    shift, factor = half_shift(fmt)
    used = ~np.isnan(fmt.table)
    decoded = half_bits(np.flatnonzero(used), fmt.bits, shift).astype(np.float64) * factor
    np.testing.assert_array_equal(decoded, fmt.table[used])


def test_what_is_no_float_of_five_exponent_bits_is_not_taken_for_one():
    for spelling in ("nf8", "pow2sum2", "e5m1", "codebook4", "int8"):
        assert half_shift(parse_format(spelling)) is None


def test_sums_of_two_powers_add_the_levels_of_their_halves():
    assert adds_halves(parse_format("pow2sum2/g32"))
    assert not any(adds_halves(parse_format(s)) for s in ("pow2sum1", "nf8", "mxfp8", "int8"))


def test_levels_that_sixteen_bits_would_round_are_left_to_floats():
    def chosen(spelling, activation="int8"):
        problem = LinearProblem(1024, 1024, parse_format(spelling), parse_activation(activation))
        return select(problem, x86.AVX2)

    assert chosen("mxfp8").family.name == chosen("e5m2").family.name == "x86-minifloat"
    assert "would round the levels" in chosen("mxfp8").refused["x86-table16"]
    assert chosen("e2m3/g32").family.name == "x86-table8"
    assert chosen("mxfp6").family.name == chosen("pow2sum2").family.name == "x86-table16"
    assert chosen("mxfp8", "none").family.name == "x86-minifloat"
    assert chosen("nf8", "none").family.name == "x86-table-float"


@pytest.mark.parametrize("cpu", ["x86-64-v3", "cortex-a76", "cortex-a53"])
def test_every_format_has_a_kernel(cpu):
    for info in list_formats():
        problem = LinearProblem(1024, 1024, info.example, parse_activation("int8"))
        assert select(problem, get_target(cpu)), info.spelling
    for spelling in FLOATS + TABLES:
        for activation in ("int8/tensor", "none"):
            problem = LinearProblem(1024, 1024, parse_format(spelling), parse_activation(activation))
            assert select(problem, get_target(cpu)), (spelling, activation)


@pytest.mark.parametrize("spelling, activation", [("mxfp6", "int8"), ("e4m3", "none"), ("pow2sum2", "int8")])
def test_the_wide_variants_compile(spelling, activation):
    problem = LinearProblem(64, 33, parse_format(spelling), parse_activation(activation))
    for family in families("x86"):
        if family.supports(problem, x86.AVX512):
            config = {**family.configs(problem, x86.AVX512)[0], "mr": 1, "vectors": 1}
            assert "%zmm" in tvm.compile(
                family.build(problem, config, x86.AVX512, "gemm"), target=x86.AVX512.tvm()
            ).mod.inspect_source("asm"), family.name
