"""x86 GEMM families against `LinearKernel.reference`, over odd shapes, formats, heights and epilogues."""

import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

import tvm

from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cpu.panels import Panels, half_scales
from qcompile.codegen.kernels.x86.harness import unaligned
from qcompile.errors import TargetError
from qcompile.formats import IntFormat, Quantized, parse_activation, parse_format
from qcompile.targets import x86

TARGETS = list(dict.fromkeys((x86.host(cores=1), x86.AVX2)))
"""The widest instruction set of this machine and the narrowest supported."""

FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
ROWS = [1, 2, 3, 5, 8, 13, 17]

target = pytest.mark.parametrize("target", TARGETS, ids=str)


def weights(rng, k, n, fmt):
    """Random codes that reach both ends of the range, with scales that float16 represents."""
    codes = rng.integers(fmt.qmin, fmt.qmax + 1, (k, n))
    codes[0, :] = fmt.qmin
    codes[-1, :] = fmt.qmax
    shape = (fmt.groups(k), n)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    zero = None if fmt.symmetric else rng.integers(0, fmt.qmax + 1, shape).astype(np.uint8)
    return Quantized(codes.astype(np.int8 if fmt.symmetric else np.uint8), scale, zero)


def operands(rng, m, problem):
    """Activations as the PrimFunc takes them."""
    if problem.activation.bits:
        least = 1 if problem.activation.granularity == "token" else 0  # the grid of a token is symmetric
        return rng.integers(least, 256, (m, problem.k)).astype(np.uint8), rng.uniform(0.01, 1, m).astype(np.float32)
    return rng.normal(size=(m, problem.k)).astype(np.float32), None


@functools.lru_cache(maxsize=64)
def compiled(family, problem, config, target):
    function = family.build(problem, dict(config), target, "gemm")
    return tvm.compile(function, target=target.tvm())["gemm"]


def run(family, problem, config, target, x, scale, weight, bias=None, residual=None, off=0):
    """Call the kernel on arrays that lie ``off`` elements from an aligned address."""
    place = functools.partial(unaligned, elements=off) if off else lambda a: a
    out = place(np.full((x.shape[0], problem.n), np.nan, np.float32))
    given_ = [a for a in (x, scale, *family.pack(problem, config, weight).values(), bias, residual) if a is not None]
    compiled(family, problem, tuple(config.items()), target)(*map(place, given_), out)
    return out


def magnitude(problem, x, scale, weight):
    """What rounding errors are relative to: the sum of the magnitudes of the products."""
    w = np.abs(problem.weight.decode(weight).astype(np.float64))
    if scale is None:
        return np.abs(x.astype(np.float64)) @ w
    return 255 * np.ones(x.shape) @ w * scale[:, None]


def small(config, mr=3, vectors=2):
    """The same with a small tile, which compiles fast."""
    if "columns" in config:
        return {**config, "rows": min(mr, 2), "columns": min(config["columns"], 32)}
    return {**config, "mr": mr, "vectors": min(vectors, config["vectors"])}


def able(problem, target):
    return [f for f in families("x86") if f.supports(problem, target)]


formats = st.builds(
    IntFormat,
    st.sampled_from([8, 4, 3, 2, 1, 5, 6, 7]),
    st.sampled_from([0, 32, 64, 128, 4, 20, 7]),
    st.booleans(),
)


@target
@FEW
@given(
    fmt=formats,
    k=st.one_of(st.integers(1, 9), st.integers(10, 200), st.sampled_from([127, 128, 129, 256])),
    n=st.one_of(st.integers(1, 70), st.sampled_from([96, 97, 192, 193])),
    activation=st.sampled_from(["int8/token", "int8/tensor", "none"]),
    seed=st.integers(0, 1000),
)
def test_every_family_matches_the_reference(target, fmt, k, n, activation, seed):
    rng = np.random.default_rng(seed)
    problem = LinearProblem(k, n, fmt, parse_activation(activation), threads=2)
    weight = weights(rng, k, n, fmt)
    assert able(problem, target), "every integer format has a kernel"
    for family in able(problem, target):
        config = small(rng.choice(family.configs(problem, target)), mr=int(rng.integers(1, 5)))
        for m in rng.choice(ROWS, 2, replace=False):
            x, scale = operands(rng, m, problem)
            got = run(family, problem, config, target, x, scale, weight)
            expected = family.reference(problem, x, scale, weight)
            assert (np.abs(got - expected) <= 2e-6 * magnitude(problem, x, scale, weight)).all(), (
                family.name,
                config,
                m,
            )


@FEW
@given(
    fmt=st.sampled_from(
        ["int8", "int4/g32", "int4/g32/asym", "int3/g20", "int2/g64", "int1/g32", "nf4/g32", "mxfp8", "q4_k"]
    ),
    k=st.integers(1, 150),
    n=st.integers(1, 300),
    streams=st.integers(2, 5),
    threads=st.sampled_from([1, 2]),
    activation=st.sampled_from(["int8/token", "none"]),
    seed=st.integers(0, 1000),
)
def test_a_single_row_takes_several_panels_at_once(fmt, k, n, streams, threads, activation, seed):
    """Any number of panels, also fewer than it takes at once; the epilogue finds its columns."""
    rng = np.random.default_rng(seed)
    problem = LinearProblem(
        k, n, parse_format(fmt), parse_activation(activation), Epilogue(bias=True, residual=True), threads=threads
    )
    weight = problem.weight.encode(rng.normal(size=(k, n)).astype(np.float32))
    bias = rng.normal(size=n).astype(np.float32)
    for family in able(problem, x86.AVX2):
        config = {**small(family.configs(problem, x86.AVX2)[0]), "streams": streams}
        for m in (1, 2):
            x, scale = operands(rng, m, problem)
            residual = rng.normal(size=(m, n)).astype(np.float32)
            got = run(family, problem, config, x86.AVX2, x, scale, weight, bias, residual)
            expected = family.reference(problem, x, scale, weight, bias, residual)
            tolerance = 1e-3 * (magnitude(problem, x, scale, weight) + 5)  # scales are rounded to float16
            assert (np.abs(got - expected) <= tolerance).all(), (family.name, config, m)


@target
@pytest.mark.parametrize("fmt", ["int8", "int8/asym", "int4", "int4/asym", "int3", "int2"])
def test_per_channel_sums_are_exact(target, fmt):
    """With scales of one the result is the integer sum, also where byte products are largest."""
    rng = np.random.default_rng(1)
    fmt = parse_format(fmt)
    problem = LinearProblem(515, 35, fmt, parse_activation("int8/tensor"))
    weight = weights(rng, 515, 35, fmt)
    weight.scale[...] = 1
    x, scale = operands(rng, 5, problem)
    x[0], x[1], scale[...] = 255, 0, 1
    weight.codes[:, 0] = fmt.qmin
    weight.codes[:, 1] = fmt.qmax
    for family in able(problem, target):
        config = small(family.configs(problem, target)[0])
        got = run(family, problem, config, target, x, scale, weight)
        expected = family.reference(problem, x, scale, weight).astype(np.float32)
        np.testing.assert_array_equal(got, expected, err_msg=f"{family.name} {config}")


@FEW
@given(
    fmt=st.sampled_from(["int8", "int8/asym", "int8/g32", "int8/g20/asym"]),
    k=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_bytes_at_both_ends_do_not_saturate(fmt, k, seed):
    """Sums stay exact where pairs of activations and weights are as large as they get, of either sign."""
    rng = np.random.default_rng(seed)
    fmt = parse_format(fmt)
    problem = LinearProblem(k, 19, fmt, parse_activation("int8"))
    weight = weights(rng, k, 19, fmt)
    weight.codes[...] = rng.choice([fmt.qmin, fmt.qmax], weight.codes.shape)
    weight.scale[...] = 1
    x = rng.choice(np.array([0, 1, 64, 127, 128, 192, 255], np.uint8), (7, k))
    for family in able(problem, x86.AVX2):
        config = small(family.configs(problem, x86.AVX2)[0])
        got = run(family, problem, config, x86.AVX2, x, np.ones(7, np.float32), weight)
        expected = family.reference(problem, x, np.ones(7, np.float32), weight).astype(np.float32)
        np.testing.assert_array_equal(got, expected, err_msg=family.name)


@target
@pytest.mark.parametrize("config", [0, 1])
def test_every_height_of_a_tile(target, config):
    rng = np.random.default_rng(2)
    fmt = IntFormat(4, 32)
    for activation in ("int8", "none"):
        problem = LinearProblem(64, 50, fmt, parse_activation(activation), Epilogue(True, "relu", True), threads=2)
        weight = weights(rng, 64, 50, fmt)
        bias = rng.normal(size=50).astype(np.float32)
        for family in able(problem, target):
            chosen = family.configs(problem, target)[config]
            for m in range(1, 2 * chosen.get("mr", 4) + 2):
                x, scale = operands(rng, m, problem)
                residual = rng.normal(size=(m, 50)).astype(np.float32)
                got = run(family, problem, chosen, target, x, scale, weight, bias, residual)
                expected = family.reference(problem, x, scale, weight, bias, residual)
                tolerance = 2e-6 * (magnitude(problem, x, scale, weight) + 5)
                assert (np.abs(got - expected) <= tolerance).all(), (family.name, chosen, m)


@target
@pytest.mark.parametrize(
    "bias, activation, residual",
    [
        (False, "", False),
        (True, "relu", False),
        (True, "gelu", True),
        (False, "gelu_tanh", True),
        (True, "silu", True),
        (False, "gelu", False),
    ],
)
def test_epilogues(target, activation, bias, residual):
    rng = np.random.default_rng(3)
    fmt = IntFormat(8)
    problem = LinearProblem(40, 53, fmt, parse_activation("int8"), Epilogue(bias, activation, residual))
    weight = weights(rng, 40, 53, fmt)
    x, scale = operands(rng, 6, problem)
    scale *= 0.01
    b = rng.normal(size=53).astype(np.float32) if bias else None
    r = rng.normal(size=(6, 53)).astype(np.float32) if residual else None
    choice = select(problem, target)
    got = run(choice.family, problem, small(choice.config), target, x, scale, weight, b, r)
    expected = choice.family.reference(problem, x, scale, weight, b, r)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@target
@pytest.mark.parametrize("fmt, activation", [("int8", "int8"), ("int4/g32/asym", "int8"), ("int4/g32", "none")])
def test_arguments_may_lie_anywhere(target, fmt, activation):
    rng = np.random.default_rng(4)
    fmt = parse_format(fmt)
    problem = LinearProblem(70, 37, fmt, parse_activation(activation), Epilogue(True, "", True))
    weight = weights(rng, 70, 37, fmt)
    bias, residual = rng.normal(size=37).astype(np.float32), rng.normal(size=(9, 37)).astype(np.float32)
    for family in able(problem, target):
        config = small(family.configs(problem, target)[0])
        x, scale = operands(rng, 9, problem)
        expected = family.reference(problem, x, scale, weight, bias, residual)
        got = run(family, problem, config, target, x, scale, weight, bias, residual, off=1)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * magnitude(problem, x, scale, weight).max())


@target
def test_no_rows_is_no_work(target):
    problem = LinearProblem(32, 16, IntFormat(8), parse_activation("int8"), threads=2)
    choice = select(problem, target)
    weight = weights(np.random.default_rng(5), 32, 16, problem.weight)
    empty = [tvm.runtime.empty((0, 32), "uint8"), tvm.runtime.empty((0,), "float32")]
    packed = choice.family.pack(problem, choice.config, weight).values()
    out = tvm.runtime.empty((0, 16), "float32")
    compiled(choice.family, problem, tuple(choice.config.items()), target)(*empty, *packed, out)


@target
def test_reads_stay_inside_the_activations(target):
    """Rows whose length is no multiple of four, ending where an unreadable page begins."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 0) == 0
    rng = np.random.default_rng(6)
    try:
        for k, fmt in ((7, "int8"), (13, "int4/g4"), (50, "int3"), (3, "int4"), (9, "int8/asym"), (6, "int2/g4/asym")):
            fmt = parse_format(fmt)
            problem = LinearProblem(k, 20, fmt, parse_activation("int8"))
            weight = weights(rng, k, 20, fmt)
            x, scale = operands(rng, 3, problem)
            edge = np.frombuffer(memory, np.uint8, x.size, page - x.size).reshape(x.shape)
            edge[...] = x
            for family in able(problem, target):
                config = small(family.configs(problem, target)[0])
                got = run(family, problem, config, target, edge, scale, weight)
                expected = family.reference(problem, x, scale, weight)
                np.testing.assert_allclose(got, expected, atol=2e-6 * magnitude(problem, x, scale, weight).max())
            del edge
    finally:
        libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@target
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_rows, span", [(1, 1), (16, 1), (16, 3), (256, 4)])
def test_every_blocking_covers_the_output_once(target, threads, block_rows, span):
    rng = np.random.default_rng(7)
    problem = LinearProblem(16, 333, IntFormat(8), parse_activation("int8"), threads=threads)
    weight = weights(rng, 16, 333, problem.weight)
    choice = select(problem, target)
    config = {**small(choice.config), "block_rows": block_rows, "panels": span}
    for m in (1, 45, 100):
        x, scale = operands(rng, m, problem)
        got = run(choice.family, problem, config, target, x, scale, weight)
        np.testing.assert_allclose(got, choice.family.reference(problem, x, scale, weight), rtol=1e-5, atol=1e-3)


@given(
    fmt=formats, k=st.integers(1, 300), n=st.integers(1, 100), depth=st.sampled_from([2, 4]), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_packing_loses_nothing(fmt, k, n, depth, seed):
    """The stored codes of every k can be found again where `Panels.source` says."""
    weight = weights(np.random.default_rng(seed), k, n, fmt)
    panels = Panels(k, n, fmt, 8, 2, depth)
    packed = panels.pack_codes(weight)
    source = panels.source()
    codes = panels.layout.unpack(packed, source.size, n).astype(np.int64) - (panels.bias if fmt.symmetric else 0)
    stored = source >= 0
    assert sorted(source[stored]) == list(range(k))
    found = codes[stored][np.argsort(source[stored])]
    np.testing.assert_array_equal(found % (1 << fmt.bits), weight.codes.astype(np.int64) % (1 << fmt.bits))


@given(st.integers(0, 1000))
def test_half_scales_keep_eleven_bits_over_a_wide_range(seed):
    rng = np.random.default_rng(seed)
    scale = np.ldexp(rng.uniform(0.5, 1, (9, 5)), rng.integers(-100, 80, 5) - rng.integers(0, 20, (9, 1))).astype(
        np.float32
    )
    half, column = half_scales(scale)
    np.testing.assert_allclose(half.astype(np.float64) * column, scale, rtol=2.0**-11)


def test_float32_scales_are_kept_exactly():
    rng = np.random.default_rng(8)
    fmt = IntFormat(4, 32)
    problem = LinearProblem(96, 16, fmt, parse_activation("int8"))
    weight = Quantized(weights(rng, 96, 16, fmt).codes, rng.uniform(0.01, 0.1, (3, 16)).astype(np.float32))
    choice = select(problem, TARGETS[-1])
    exact = next(c for c in choice.family.configs(problem, TARGETS[-1]) if c["scales"] == "float32")
    x, scale = operands(rng, 4, problem)
    expected = choice.family.reference(problem, x, scale, weight)
    got = run(choice.family, problem, exact, TARGETS[-1], x, scale, weight)
    np.testing.assert_allclose(got, expected, atol=1e-6 * magnitude(problem, x, scale, weight).max())


def test_refusals_say_why():
    def reason(name, target, fmt="int8", activation="int8", k=64):
        problem = LinearProblem(k, 64, parse_format(fmt), parse_activation(activation))
        return next(f for f in families("x86") if f.name == name).supports(problem, target).reason

    assert "VNNI" in reason("x86-vnni", x86.AVX2)
    assert "9 bits" in reason("x86-vnni", x86.VNNI, "int8/asym")
    assert "int16" in reason("x86-maddubs", x86.AVX2, "int8")
    assert "overflow" in reason("x86-vnni", x86.VNNI, k=1 << 17)
    assert "float ones" in reason("x86-vnni", x86.VNNI, activation="none")
    assert "int8" in reason("x86-float", x86.AVX2)
    assert "at their width" in reason("x86-maddwd", x86.AVX2, "int4")
    assert reason("x86-vnni", x86.VNNI) == ""


def test_selection_gives_its_reason_and_the_refusals():
    problem = LinearProblem(384, 1152, IntFormat(8), parse_activation("int8"))
    choice = select(problem, x86.VNNI)
    assert choice.family.name == "x86-vnni" and "rows" in choice.reason and "int16" in choice.refused["x86-maddubs"]
    assert select(problem, x86.AVX2).family.name == "x86-pairs"
    for fmt in ("int4", "int4/g32", "int3/g64/asym", "int2"):
        narrow = LinearProblem(384, 1152, parse_format(fmt), parse_activation("int8"))
        assert select(narrow, x86.VNNI).family.name == "x86-vnni", "VNNI does the work of three instructions in one"
    assert (
        select(LinearProblem(64, 64, IntFormat(4, 32), parse_activation("int8")), x86.AVX2).family.name == "x86-maddubs"
    )
    with pytest.raises(TargetError, match=r"int8 weights .* overflow"):
        select(LinearProblem(1 << 17, 8, IntFormat(8), parse_activation("int8")), x86.VNNI)


def test_a_tuned_config_wins_over_the_cost_model():
    problem = LinearProblem(384, 1152, IntFormat(8), parse_activation("int8"))

    class Database:
        def lookup(self, problem, target):
            return "x86-maddwd", {"mr": 4}, "measured"

    choice = select(problem, x86.VNNI, Database())
    assert (choice.family.name, choice.config, choice.reason) == ("x86-maddwd", {"mr": 4}, "measured")


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_accumulators_stay_in_registers(fmt):
    """Between two dot products of the default tile no vector is stored to the stack."""
    problem = LinearProblem(256, 192, parse_format(fmt), parse_activation("int8"))
    choice = select(problem, x86.VNNI)
    module = tvm.compile(choice.family.build(problem, choice.config, x86.VNNI, "gemm"), target=x86.VNNI.tvm())
    lines = module.mod.inspect_source("asm").splitlines()
    dots = [i for i, line in enumerate(lines) if "vpdpbusd" in line]
    assert len(dots) > 30
    loops = [lines[a:b] for a, b in itertools.pairwise(dots) if b - a < 6]
    spill = re.compile(r"vmov\w+\s+%[yz]mm\d+, .*\(%rsp\)")
    assert not any(spill.search(line) for loop in loops for line in loop)
