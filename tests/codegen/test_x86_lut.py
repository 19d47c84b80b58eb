"""Look-up kernels: bit planes of every format that has them, and tables of levels, against numpy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

import tvm

from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cpu.levels import exact_levels, rounded_levels
from qcompile.codegen.kernels.cpu.lut import (
    PAIR,
    PlanePanels,
    exact_tables,
    plane_sum,
    plane_sums,
    scaled_tables,
    split,
    unsigned_codes,
)
from qcompile.codegen.kernels.x86 import ByteTableGemm, FloatTableGemm, LutGemm, WordTableGemm
from qcompile.formats import BitPlane, DualInt4, NvFp4, Quantized, SuperBlock, parse_activation, parse_format
from qcompile.targets import x86

PLANES = ["int1/g128", "int2", "int2/g20/asym", "int3/g64", "int4/g96", "ternary/g64", "bitplane2/g40", "bitplane3/channel",
          "dual4/g32", "int6/g32/asym", "fixed<3,1>", "q2_k", "q4_k", "q6_k"]  # fmt: skip
TABLES = ["nf4/g64", "nf3/channel", "mxfp4", "nvfp4", "e2m1/g24", "codebook4/g32", "codebook2/g128", "pow2sum1/g32"]


def encoded(rng, fmt, k, n):
    """A matrix of the format whose scales float16 represents next to each other."""
    weight = fmt.encode(rng.normal(size=(k, n)).astype(np.float32))
    if isinstance(fmt, DualInt4 | NvFp4 | SuperBlock):  # their scales are kept as they are
        return weight
    scale = weight.scale.astype(np.float16).astype(np.float32)
    aux = {name: a.astype(np.float16).astype(np.float32) if name == "offset" else a for name, a in weight.aux.items()}
    return Quantized(weight.codes, scale, weight.zero_point, aux)


def activations(rng, m, k, spread, least=-127):
    codes = np.clip(np.rint(rng.normal(size=(m, k)) * spread), least, 127)
    return (codes + 128).astype(np.uint8), rng.uniform(0.01, 1, m).astype(np.float32)


def run(family, problem, config, target, x, scale, weight, *tail):
    kernel = tvm.compile(family.build(problem, config, target, "gemm"), target=target.tvm())["gemm"]
    out = np.full((len(x), problem.n), np.nan, np.float32)
    kernel(x, scale, *family.pack(problem, config, weight).values(), *tail, out)
    return out


def close(family, problem, weight, x, scale, got):
    expected = family.reference(problem, x, scale, weight)
    magnitude = np.abs(x.astype(np.float64) - 128) @ np.abs(problem.weight.decode(weight).astype(np.float64))
    tolerance = 4e-6 * (magnitude * scale[:, None] + 1e-6)
    assert (np.abs(got - expected) <= tolerance).all(), np.abs(got - expected).max()


@pytest.mark.parametrize("spelling", PLANES)
@pytest.mark.parametrize("k, n", [(257, 45)])
def test_planes_of_every_format(spelling, k, n):
    """With activations small and large: the second kind fills the lists of extra tables."""
    rng = np.random.default_rng(0)
    fmt, family = parse_format(spelling), LutGemm()
    problem = LinearProblem(k, n, fmt, parse_activation("int8/tensor"), threads=2)
    weight = encoded(rng, fmt, k, n)
    config = {**family.configs(problem, x86.AVX2)[0], "rows": 2, "block_rows": 4}
    kernel = tvm.compile(family.build(problem, config, x86.AVX2, "gemm"), target=x86.AVX2.tvm())["gemm"]
    packed = family.pack(problem, config, weight).values()
    for m, spread in ((1, 30), (1, 400), (7, 80)):
        x, scale = activations(rng, m, k, spread, -128)
        out = np.full((m, n), np.nan, np.float32)
        kernel(x, scale, *packed, out)
        close(family, problem, weight, x, scale, out)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    spelling=st.sampled_from(PLANES),
    k=st.one_of(st.integers(1, 20), st.integers(21, 150)),
    n=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_planes_of_any_shape(spelling, k, n, seed):
    rng = np.random.default_rng(seed)
    fmt, family = parse_format(spelling), LutGemm()
    problem = LinearProblem(k, n, fmt, parse_activation("int8"), Epilogue(True, "relu", True))
    weight = encoded(rng, fmt, k, n)
    config = {**rng.choice(family.configs(problem, x86.AVX2)), "rows": int(rng.integers(1, 4))}
    m = int(rng.integers(1, 6))
    x, scale = activations(rng, m, k, rng.choice([20, 300]))
    bias, residual = rng.normal(size=n).astype(np.float32), rng.normal(size=(m, n)).astype(np.float32)
    got = run(family, problem, config, x86.AVX2, x, scale, weight, bias, residual)
    expected = family.reference(problem, x, scale, weight, bias, residual)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("spelling", ["int1/g128", "int2/g32", "int2", "int3/g64", "bitplane2/g40", "q2_k"])
def test_two_panels_at_a_time_and_their_lines_asked_for_early_give_the_same_numbers(spelling):
    rng = np.random.default_rng(5)
    fmt, family, k = parse_format(spelling), LutGemm(), 512
    narrow = min(
        config["columns"] for config in family.configs(LinearProblem(k, 999, fmt, parse_activation("int8")), x86.AVX2)
    )
    n = 8 * narrow - 5
    problem = LinearProblem(k, n, fmt, parse_activation("int8"))
    able = [c for c in family.configs(problem, x86.AVX2) if c["columns"] == narrow]
    two, one = (next(c for c in able if c["streams"] == streams) for streams in (2, 1))
    two = {**two, "early": 2}
    weight = encoded(rng, fmt, k, n)
    for m in (1, 3):
        x, scale = activations(rng, m, k, 200)
        got = [run(family, problem, config, x86.AVX2, x, scale, weight) for config in (two, one)]
        np.testing.assert_array_equal(*got)
        close(family, problem, weight, x, scale, got[0])


@pytest.mark.parametrize("spelling", ["int1/g256", "int2/g128", "ternary/g256", "int2/g136"])
def test_the_largest_sums_of_a_group_fit(spelling):
    """Codes at one end, activations at another: what 16 bits hold for the first three, and what they do not for the last."""
    fmt, family, k, n = parse_format(spelling), LutGemm(), 512, 64
    problem = LinearProblem(k, n, fmt, parse_activation("int8"))
    groups = -(-k // fmt.group)
    rows = np.full((2, k), 255, np.uint8)
    rows[1, ::2] = 1
    for code in (-1, 0) if spelling.startswith("int1") else (-2, 1) if spelling.startswith("int2") else (-1, 1):
        weight = Quantized(np.full((k, n), code, np.int8), np.ones((groups, n), np.float32))
        got = run(family, problem, family.configs(problem, x86.AVX2)[0], x86.AVX2, rows, np.ones(2, np.float32), weight)
        np.testing.assert_array_equal(got, np.array([[127 * k * code], [0]]) * np.ones(n))


@pytest.mark.parametrize("spelling", TABLES)
def test_tables_of_every_format(spelling):
    rng = np.random.default_rng(1)
    fmt = parse_format(spelling)
    problem = LinearProblem(197, 37, fmt, parse_activation("int8"))
    able = [f for f in (ByteTableGemm(), WordTableGemm()) if f.supports(problem, x86.AVX2)]
    assert len(able) == 1 and select(problem, x86.AVX2).family.name == able[0].name
    weight = encoded(rng, fmt, 197, 37)
    config = able[0].configs(problem, x86.AVX2)[0]
    x, scale = activations(rng, 3, 197, 60)
    got = run(able[0], problem, config, x86.AVX2, x, scale, weight)
    magnitude = np.abs(x.astype(np.float64) - 128) @ np.abs(fmt.decode(weight).astype(np.float64)) * scale[:, None]
    assert (np.abs(got - able[0].reference(problem, x, scale, weight)) <= 1e-4 * magnitude).all()


@pytest.mark.parametrize("k, spelling", [(197, s) for s in TABLES if s[:4] != "code"] + [(192, "codebook4/g32")])
def test_tables_times_float_activations(k, spelling):
    rng = np.random.default_rng(3)
    fmt, family = parse_format(spelling), FloatTableGemm()
    problem = LinearProblem(k, 37, fmt, parse_activation("none"))
    assert select(problem, x86.AVX2).family.name == family.name
    weight, x = encoded(rng, fmt, k, 37), rng.normal(size=(3, k)).astype(np.float32)
    config = family.configs(problem, x86.AVX2)[0]
    kernel = tvm.compile(family.build(problem, config, x86.AVX2, "gemm"), target=x86.AVX2.tvm())["gemm"]
    got = np.full((3, 37), np.nan, np.float32)
    kernel(x, *family.pack(problem, config, weight).values(), got)
    magnitude = np.abs(x) @ np.abs(fmt.decode(weight))
    assert (np.abs(got - family.reference(problem, x, None, weight)) <= 1e-6 * magnitude).all()


def test_learned_levels_with_places_to_fill_are_refused():
    """A place without a weight needs a level that is 0."""
    problem = LinearProblem(197, 37, parse_format("codebook4/g32"), parse_activation("none"))
    support = FloatTableGemm().supports(problem, x86.AVX2)
    assert not support and "no level is 0" in support.reason


@pytest.mark.parametrize("size, columns", [(32, 64), (64, 64), (64, 128)])
@pytest.mark.parametrize("spelling", ["int2/g32", "int1", "bitplane3/g16"])
def test_packed_planes_can_be_read_back(spelling, size, columns):
    """By the layout that model.onnx uses."""
    rng = np.random.default_rng(2)
    fmt = parse_format(spelling)
    problem = LinearProblem(77, 90, fmt, parse_activation("int8"))
    config = {"bytes": size, "columns": columns, "scales": "float16"}
    weight = encoded(rng, fmt, 77, 90)
    stored = LutGemm().stored(problem, config)
    codes = stored.layout.unpack(LutGemm().pack(problem, config, weight)["weight"], len(stored.source), 90)
    found = codes[np.flatnonzero(stored.source >= 0)]
    np.testing.assert_array_equal(found, unsigned_codes(weight, stored.bias))


@given(st.lists(st.integers(-128, 127), min_size=4, max_size=4))
def test_activations_split_into_parts_that_fit(four):
    parts = split(np.array(four))
    np.testing.assert_array_equal(parts.sum(0), four)
    assert (np.abs(parts).sum(1) <= 255).all() and len(parts) <= 3
    assert (parts * np.sign(four) >= 0).all()


@settings(max_examples=20, deadline=None)
@given(
    spelling=st.sampled_from([s for s in PLANES if plane_sum(parse_format(s)) is not None]),
    k=st.integers(1, 60),
    seed=st.integers(0, 99),
    spread=st.sampled_from([10, 90, 900]),
)
def test_looked_up_sums_are_those_of_the_products(spelling, k, seed, spread):
    """The numpy model of the method: exact with extra tables, close with scaled ones."""
    rng = np.random.default_rng(seed)
    fmt, n = parse_format(spelling), 9
    planes = plane_sum(fmt)
    panels = PlanePanels(k, n, planes, 8, adjacent=planes.bits == 2)
    weight = encoded(rng, fmt, k, n)
    packed = panels.pack_codes(weight)
    a = np.clip(np.rint(rng.normal(size=(1, k)) * spread), -128, 127)
    pairs = panels.positions(a)[0]
    codes = unsigned_codes(weight, planes.bias if planes.offset == "constant" else 0).astype(np.int64)
    products = np.zeros((panels.groups, planes.bits, n))
    for g in range(panels.groups):
        part = slice(g * panels.group, (g + 1) * panels.group)
        for p in range(planes.bits):
            products[g, p] = a[0, part] @ (codes[part] >> p & 1)
    negative = np.minimum(pairs, 0).reshape(panels.groups, -1).sum(1)[:, None, None]
    tables, extra = exact_tables(pairs)
    sums = plane_sums(panels, tables, packed)
    for pair, table in extra:
        alone = np.zeros_like(tables)
        alone[pair] = table
        sums += plane_sums(panels, alone, packed)
    np.testing.assert_array_equal(sums + negative, products)
    rounded, scale = scaled_tables(pairs, panels.pairs_per_group)
    near = plane_sums(panels, rounded, packed) * scale[:, None, None] + negative
    assert (np.abs(near - products) <= 0.5 * scale[:, None, None] * 2 * panels.pairs_per_group + 1e-3).all()


def test_levels_are_exact_where_they_can_be():
    assert exact_levels(parse_format("mxfp4")).factor == 0.5
    assert exact_levels(parse_format("pow2sum1")).level.max() == 64
    assert exact_levels(parse_format("nf4/g64")) is None
    fmt = parse_format("nf4/g64")
    levels = rounded_levels(fmt, fmt.encode(np.ones((64, 1), np.float32)), 32767)
    np.testing.assert_allclose(levels.level * levels.factor, fmt.table, atol=1 / 65534)


def test_refusals_say_why():
    def reason(spelling, activation="int8", target=x86.AVX2):
        problem = LinearProblem(64, 64, parse_format(spelling), parse_activation(activation))
        return LutGemm().supports(problem, target).reason

    assert "no sums" in reason("nf4/g64")
    assert "float ones" in reason("int2", "none")
    assert "slower" in reason("int8")
    assert reason("bitplane2/g64") == ""


def test_a_bit_plane_costs_less_than_two():
    """What the choice between kernels rests on."""
    family = LutGemm()

    def cost(fmt, m):
        problem = LinearProblem(4096, 4096, fmt, parse_activation("int8"))
        return family.cost(problem, family.configs(problem, x86.AVX2)[0], x86.AVX2, m)

    assert cost(parse_format("int1/g128"), 1) < cost(parse_format("int2/g128"), 1) < cost(parse_format("int3/g128"), 1)
    assert cost(BitPlane(2, 128), 1) > cost(parse_format("int2/g128"), 1)
    assert PAIR == 8
