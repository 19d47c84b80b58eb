"""ARM GEMM families against `LinearKernel.reference` and the x86 kernels: formats, odd shapes, heights, epilogues.

Kernels of many problems are linked into one program, so that a test starts the emulator once.
"""

import numpy as np
import pytest
import tvm

from qcompile.codegen.kernels import families, select
from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.errors import TargetError
from qcompile.formats import IntFormat, Quantized, parse_activation, parse_format
from qcompile.targets import get_target, x86

CPUS = ["cortex-a53", "cortex-a76", "neoverse-v1"]
"""Each is tested with the families that the ones before it do not have."""
FORMATS = [
    "int8", "int8/g7/asym", "int4", "int4/g32", "int4/g20/asym", "int2", "int2/g64/asym", "int1/g32", "int1",
    "int3/g32", "int3/asym", "int5/g32", "int6/asym", "int7/g4", "int4/g128", "int2/g16",
]  # fmt: skip

on = pytest.mark.parametrize("cpu", CPUS)


def weights(rng, k, n, fmt):
    """Random codes that reach both ends of the range, with scales that float16 represents."""
    codes = rng.integers(fmt.qmin, fmt.qmax + 1, (k, n))
    codes[0, :], codes[-1, :] = fmt.qmin, fmt.qmax
    shape = (fmt.groups(k), n)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    zero = None if fmt.symmetric else rng.integers(0, fmt.qmax + 1, shape).astype(np.uint8)
    return Quantized(codes.astype(np.int8 if fmt.symmetric else np.uint8), scale, zero)


def operands(rng, m, problem):
    if problem.activation.bits:
        lowest = 1 if problem.activation.granularity == "token" else 0
        return rng.integers(lowest, 256, (m, problem.k)).astype(np.uint8), rng.uniform(0.01, 1, m).astype(np.float32)
    return rng.normal(size=(m, problem.k)).astype(np.float32), None


def magnitude(problem, x, scale, weight):
    """What rounding errors are relative to: the sum of the magnitudes of the products."""
    w = np.abs(problem.weight.decode(weight).astype(np.float64))
    if scale is None:
        return np.abs(x.astype(np.float64)) @ w
    return 255 * np.ones(x.shape) @ w * scale[:, None]


def small(config, mr=2, vectors=2):
    """The same with a small tile of whole quads of columns, which compiles fast."""
    if "columns" in config:
        return {**config, "rows": mr, "columns": 8 * vectors, "block_rows": 2 * mr}
    return {**config, "mr": mr, "vectors": vectors * max(1, 4 // config["lanes"]), "panels": 2}


class Batch:
    """Kernels and calls, run together."""

    def __init__(self, cpu):
        self.target = get_target(cpu, cores=1)
        self.functions, self.made, self.expected = {}, [], []

    def add(self, family, problem, config, weight):
        name = f"gemm{len(self.functions)}"
        self.functions[name] = family.build(problem, config, self.target, name)
        return name, list(family.pack(problem, config, weight).values())

    def call(self, name, packed, x, scale, bias=None, residual=None):
        out = np.full((x.shape[0], self.columns), np.nan, np.float32)
        self.made.append((name, [a for a in (x, scale, *packed, bias, residual) if a is not None] + [out]))
        return out

    def run(self, offset=0):
        from qcompile.codegen.kernels.arm.harness import Executable

        Executable(self.functions, self.target).calls(self.made, offset)


def able(problem, target):
    earlier = [get_target(cpu) for cpu in CPUS[: CPUS.index(target.cpu)]]
    found = [f for f in families("arm") if f.supports(problem, target)]
    return [f for f in found if not any(f.supports(problem, other) for other in earlier)]


@on
def test_every_family_matches_the_reference(cpu, emulation):
    rng = np.random.default_rng(CPUS.index(cpu))
    batch, checks = Batch(cpu), []
    for i, spelling in enumerate(FORMATS):
        k = int(rng.choice([1, 3, 5, 15, 16, 17, 31, 33, 64, 70, 100, 127, 129, 130, 257]))
        n = int(rng.integers(1, 40))
        activation = ["int8/token", "int8/tensor", "int8/token", "none"][i % 4]
        problem = LinearProblem(k, n, parse_format(spelling), parse_activation(activation))
        assert select(problem, batch.target), "every integer format has a kernel"
        for family in able(problem, batch.target):
            weight = weights(rng, k, n, problem.weight)
            config = small(rng.choice(family.configs(problem, batch.target)), vectors=int(rng.integers(1, 3)))
            name, packed = batch.add(family, problem, config, weight)
            batch.columns = n
            for m in (1, int(rng.integers(2, 6))):
                x, scale = operands(rng, m, problem)
                checks.append((batch.call(name, packed, x, scale), family, problem, x, scale, weight))
    batch.run(offset=4)
    for got, family, problem, x, scale, weight in checks:
        expected = family.reference(problem, x, scale, weight)
        worst = (np.abs(got - expected) - 2e-6 * magnitude(problem, x, scale, weight)).max()
        assert worst <= 0, (family.name, problem, len(x))


@on
def test_ternary_fixed_point_dual_grained_bit_plane_and_super_block_weights(cpu, emulation):
    rng = np.random.default_rng(5)
    batch, checks = Batch(cpu), []
    spellings = (
        "ternary/channel",
        "ternary/g32",
        "dual4/g32",
        "fixed<6>",
        "bitplane2/g32",
        "bitplane3",
        "bitplane1/g64",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
    )
    for spelling in spellings:
        k, n = int(rng.integers(33, 140)), int(rng.integers(1, 30))
        problem = LinearProblem(k, n, parse_format(spelling), parse_activation("int8"))
        values = rng.normal(size=(k, n)).astype(np.float32)
        weight = problem.weight.quantize(values, problem.weight.minmax_grid(values))
        assert select(problem, batch.target)
        for family in able(problem, batch.target):
            config = {**small(family.configs(problem, batch.target)[0]), "scales": "float32"}
            name, packed = batch.add(family, problem, config, weight)
            batch.columns = n
            for m in (1, 3):
                x, scale = operands(rng, m, problem)
                checks.append((batch.call(name, packed, x, scale), family, problem, x, scale, weight))
    batch.run()
    for got, family, problem, x, scale, weight in checks:
        expected = family.reference(problem, x, scale, weight)
        assert (np.abs(got - expected) <= 2e-6 * magnitude(problem, x, scale, weight)).all(), (family.name, problem)


@on
def test_results_are_those_of_x86_bit_for_bit(cpu, emulation):
    """The same integers in every group, and the same float operations on them."""
    if not x86.host_features() >= x86.AVX2.features:
        pytest.skip("needs AVX2")
    rng = np.random.default_rng(7)
    batch, checks = Batch(cpu), []
    for spelling, k, n, activation, act in (
        ("int8", 67, 21, "int8", "gelu"),
        ("int4/g32", 96, 33, "int8", ""),
        ("int2/g32/asym", 70, 19, "int8", "silu"),
        ("int3/g32", 64, 17, "int8", "relu"),
        ("int4/g32/asym", 70, 18, "none", "gelu_tanh"),
    ):
        problem = LinearProblem(k, n, parse_format(spelling), parse_activation(activation), Epilogue(True, act, True))
        weight = weights(rng, k, n, problem.weight)
        x, scale = operands(rng, 3, problem)
        bias, residual = rng.normal(size=n).astype(np.float32), rng.normal(size=(3, n)).astype(np.float32)
        names = {"x86-maddubs", "x86-maddwd", "x86-float"}
        peer = next(f for f in families("x86") if f.name in names and f.supports(problem, x86.AVX2))
        config = small(peer.configs(problem, x86.AVX2)[0])
        expected = np.empty((3, n), np.float32)
        given = (x, scale, *peer.pack(problem, config, weight).values(), bias, residual, expected)
        function = tvm.compile(peer.build(problem, config, x86.AVX2, "gemm"), target=x86.AVX2.tvm())["gemm"]
        function(*(a for a in given if a is not None))
        batch.columns = n
        for family in able(problem, batch.target):
            name, packed = batch.add(family, problem, small(family.configs(problem, batch.target)[0]), weight)
            checks.append((family.name, spelling, batch.call(name, packed, x, scale, bias, residual), expected))
    batch.run()
    for family, spelling, got, expected in checks:
        np.testing.assert_array_equal(got, expected, err_msg=f"{family} {spelling}")


@on
def test_sums_are_exact_where_they_are_largest(cpu, emulation):
    """With scales of one the result is the integer sum, also for the largest codes and activations."""
    rng = np.random.default_rng(1)
    batch, checks = Batch(cpu), []
    batch.columns = 9
    for spelling in ("int8", "int8/asym", "int7", "int6", "int5/asym", "int4/asym", "int2", "int1", "int3/asym"):
        problem = LinearProblem(1100, 9, parse_format(spelling), parse_activation("int8"))
        weight = weights(rng, 1100, 9, problem.weight)
        weight.scale[...] = 1
        weight.codes[:, 0], weight.codes[:, 1] = problem.weight.qmin, problem.weight.qmax
        for family in able(problem, batch.target):
            name, packed = batch.add(family, problem, small(family.configs(problem, batch.target)[0]), weight)
            for value in (1, 255):
                rows = 2 if value == 255 else 1
                x, scale = np.full((rows, 1100), value, np.uint8), np.ones(rows, np.float32)
                checks.append((batch.call(name, packed, x, scale), family, problem, x, scale, weight))
    batch.run()
    for got, family, problem, x, scale, weight in checks:
        expected = family.reference(problem, x, scale, weight).astype(np.float32)
        np.testing.assert_array_equal(got, expected, err_msg=f"{family.name} {problem.weight}")


@on
def test_every_height_of_the_default_tile(cpu, emulation):
    rng = np.random.default_rng(2)
    batch, checks = Batch(cpu), []
    problem = LinearProblem(48, 50, IntFormat(4, 32), parse_activation("int8"), Epilogue(True, "relu", True))
    weight = weights(rng, 48, 50, problem.weight)
    bias = rng.normal(size=50).astype(np.float32)
    choice = select(problem, batch.target)
    name, packed = batch.add(choice.family, problem, choice.config, weight)
    batch.columns = 50
    for m in range(2 * choice.config["mr"] + 2):
        x, scale = operands(rng, m, problem)
        residual = rng.normal(size=(m, 50)).astype(np.float32)
        checks.append((batch.call(name, packed, x, scale, bias, residual), x, scale, residual))
    batch.run()
    for got, x, scale, residual in checks:
        expected = choice.family.reference(problem, x, scale, weight, bias, residual)
        assert (np.abs(got - expected) <= 2e-6 * (magnitude(problem, x, scale, weight) + 5)).all(), len(x)


def test_selection_prefers_what_the_processor_has():
    def chosen(cpu, spelling="int8", activation="int8"):
        problem = LinearProblem(384, 384, parse_format(spelling), parse_activation(activation))
        return select(problem, get_target(cpu))

    assert chosen("cortex-a53").family.name == "arm-smlal"
    assert "dotprod" in chosen("cortex-a53").refused["arm-sdot"]
    assert chosen("cortex-a76").family.name == "arm-sdot"
    assert chosen("cortex-a76", "int4/g32", "none").family.name == "arm-float"
    with pytest.raises(TargetError, match="overflow"):
        select(LinearProblem(1 << 17, 8, IntFormat(8), parse_activation("int8")), get_target("arm"))


def test_tables_cost_six_instructions_per_128_bits_of_weights(counting):
    """Beyond loads and scales. Counted, so that a scheduler which spills or reorders is seen."""
    from qcompile.codegen.kernels.arm.harness import Executable
    from qcompile.codegen.kernels.arm.lut import TableLookupGemm

    target, family, rng = get_target("cortex-a76", cores=1), TableLookupGemm(), np.random.default_rng(4)
    for spelling, most in (("int1/g128", 0.085), ("int2/g128", 0.145), ("int3/g128", 0.215)):
        problem = LinearProblem(512, 256, parse_format(spelling), parse_activation("int8"))
        x = np.clip(rng.normal(128, 30, (1, 512)), 1, 255).astype(np.uint8)
        config = family.configs(problem, target)[0]
        packed = family.pack(problem, config, weights(rng, 512, 256, problem.weight))
        program = Executable({"gemm": family.build(problem, config, target, "gemm")}, target)
        given = [x, np.ones(1, np.float32), *packed.values(), np.empty((1, 256), np.float32)]
        count = program.counts({"gemm": given})["gemm"]
        assert count < most * 512 * 256, spelling


def test_activations_of_seven_bits_split_no_table(counting):
    """The fast mode: four of them fit a table of bytes, so that the work is the same whatever they are, and exact."""
    from qcompile.codegen.kernels.arm.harness import Executable
    from qcompile.codegen.kernels.arm.lut import TableLookupGemm

    target, family, rng = get_target("cortex-a76", cores=1), TableLookupGemm(), np.random.default_rng(6)
    problem = LinearProblem(512, 64, parse_format("int2/g128"), parse_activation("int7"))
    weight = weights(rng, 512, 64, problem.weight)
    config = family.configs(problem, target)[0]
    packed = list(family.pack(problem, config, weight).values())
    program = Executable({"gemm": family.build(problem, config, target, "gemm")}, target)
    normal = np.clip(np.rint(rng.normal(size=(1, 512)) * 20), -63, 63)
    largest, beyond = rng.choice([-63, 63], (1, 512)), rng.choice([-127, 127], (1, 512))
    scale, counts = np.ones(1, np.float32), []
    for codes in (normal, largest, beyond):
        x, out = (codes + 128).astype(np.uint8), np.empty((1, 64), np.float32)
        program.call("gemm", x, scale, *packed, out)
        expected = family.reference(problem, x, scale, weight)
        assert (np.abs(out - expected) <= 2e-6 * magnitude(problem, x, scale, weight)).all()
        counts.append(program.counts({"gemm": [x, scale, *packed, out]})["gemm"])
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize(
    ("cpu", "weight", "rows", "most"),
    [
        ("cortex-a76", "int2", 1, 0.19),  # beyond loads two instructions per 16 products: an AND or a shift, and SDOT
        ("cortex-a76", "int4/g32", 16, 0.135),  # all sums of a tile in registers, signed codes
        ("neoverse-v1", "int4/g32", 16, 0.115),
    ],
)
def test_what_dot_products_cost(cpu, weight, rows, most, counting):
    """Instructions per multiply-add. Counted, so that a change which spills or widens is seen."""
    from qcompile.codegen.kernels.arm.harness import Executable

    target = get_target(cpu, cores=1)
    problem = LinearProblem(1024, 64, parse_format(weight), parse_activation("int8"), m=rows)
    name = "arm-smmla" if target.has("i8mm") else "arm-sdot"
    family = next(family for family in families("arm") if family.name == name)
    config = family.configs(problem, target)[0]
    rng = np.random.default_rng(3)
    x, scale = operands(rng, rows, problem)
    packed = family.pack(problem, config, weights(rng, 1024, 64, problem.weight))
    program = Executable({"gemm": family.build(problem, config, target, "gemm")}, target)
    count = program.counts({"gemm": [x, scale, *packed.values(), np.empty((rows, 64), np.float32)]})["gemm"]
    assert count < most * rows * 1024 * 64


@on
def test_tables_of_levels_and_small_floats(cpu, emulation):
    """Rows that leave places to fill, also with code 0 far from the level 0, all codes, and the largest activations."""
    rng = np.random.default_rng(8)
    batch, checks = Batch(cpu), []
    integers = [
        "nf4/g64", "nf4", "nf3/g20", "e2m1/g32", "e1m1", "mxfp4", "nvfp4", "codebook4/g64", "codebook2", "codebook1/g32",
        "codebook3", "e3m0/g32", "mxfp6", "e2m3/g20", "nf5/g32", "nf7/g20", "nf8", "pow2sum2/g32", "mxfp8", "e5m2", "e4m2/g7",
    ]  # fmt: skip
    floats = [*integers[1:8], "mxfp6", "e4m3/g20", "nf6/g20", "pow2sum2"]
    for spelling, activation in [*((s, "int8") for s in integers), *((s, "none") for s in floats)]:
        k, n = int(rng.integers(33, 140)), int(rng.integers(1, 30))
        if activation == "none" and spelling.startswith("codebook"):
            k = 64 * (k // 64 + 1)
        problem = LinearProblem(k, n, parse_format(spelling), parse_activation(activation))
        values = rng.normal(size=(k, n)).astype(np.float32)
        weight = problem.weight.encode(values)
        if problem.weight.bits > 4:
            codes = rng.integers(0, 1 << problem.weight.bits, (k, n)).astype(np.uint8)
            weight.codes[...] = np.where(np.isnan(problem.weight.table[codes]), weight.codes, codes)
        assert select(problem, batch.target).family.name.startswith(("arm-table", "arm-minifloat")), spelling
        for family in able(problem, batch.target):
            config = {**small(family.configs(problem, batch.target)[0]), "scales": "float32"}
            name, packed = batch.add(family, problem, config, weight)
            batch.columns = n
            for m in (1, 3):
                x, scale = operands(rng, m, problem)
                if activation == "int8":
                    x[:, ::3] = 255
                checks.append((batch.call(name, packed, x, scale), family, problem, x, scale, weight))
    batch.run()
    for got, family, problem, x, scale, weight in checks:
        expected = family.reference(problem, x, scale, weight)
        rounding = 5e-5 if "16" in family.name else 2e-6
        worst = (np.abs(got - expected) - rounding * magnitude(problem, x, scale, weight)).max()
        assert worst <= 0, (family.name, problem, worst)
