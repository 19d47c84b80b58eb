"""Products with matrices that are picked at run time: equal, bit for bit, to the linear kernel of the same family on each expert's rows."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

import tvm

from qcompile.codegen.kernels import families
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cpu.experts import ExpertFamily, ExpertProduct, SortSlots
from qcompile.formats import parse_activation, parse_format, separated
from qcompile.targets import x86

HOST, NARROW = x86.host(cores=1), x86.AVX2
TWO = x86.host(cores=2)

CASES = [
    ("int8", "int8/token", HOST),
    ("int4/g16", "int8/token", HOST),
    ("int4", "int8/token", NARROW),
    ("int3/g8/asym", "int8/token", HOST),
    ("ternary/channel", "int8/token", TWO),
    ("int4/g16", "int8/token", TWO),
    ("nf4/g16", "int8/token", HOST),
    ("nvfp4", "int8/token", HOST),
    ("q4_k", "int8/token", TWO),
    ("bitplane2/g16", "int8/token", HOST),
    ("int4/g16", "none", TWO),
    ("nf4/g16", "none", HOST),
]


def arrays(shape, dtype):
    return np.full(shape, 77, dtype)


def small(config):
    """The same with a small tile, which compiles fast."""
    if "columns" in config:
        return {**config, "rows": 2, "columns": min(config["columns"], 32)}
    return {**config, "mr": min(3, config["mr"]), "vectors": min(2, config["vectors"])}


def sort(experts, ids):
    order, start = arrays(len(ids), np.int32), arrays(experts + 1, np.int32)
    function = tvm.compile(SortSlots(experts).build("kernel"), target=HOST.tvm())["kernel"]
    function(ids, order, start)
    return order, start


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**32))
def test_slots_are_sorted_by_expert_and_stay_in_order(experts, slots, seed):
    ids = np.random.default_rng(seed).integers(-experts, experts, slots)
    for have, want in zip(sort(experts, ids), SortSlots(experts).reference(ids)):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("wrong", [3, -4])
def test_an_id_outside_of_the_stack_is_an_error(wrong):
    with pytest.raises(IndexError, match="outside of the stack"):
        sort(3, np.array([0, wrong, 2]))


@pytest.mark.parametrize(("weight", "activation", "target"), CASES, ids=lambda v: str(v))
@settings(
    max_examples=2,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.generate],
)
@given(
    shape=st.tuples(st.integers(1, 75), st.integers(1, 70), st.integers(1, 5), st.integers(1, 3)),
    tokens=st.lists(st.integers(1, 23), min_size=2, max_size=2),
    seed=st.integers(0, 2**32),
)
def test_every_expert_multiplies_its_rows_as_the_linear_kernel_does(weight, activation, target, shape, tokens, seed):
    k, n, experts, repeat = shape
    rng = np.random.default_rng(seed)
    fmt = parse_format(weight)
    problem = LinearProblem(k, n, fmt, parse_activation(activation), threads=target.cores)
    whole = fmt.encode(rng.standard_normal((k, experts * n)).astype(np.float32))
    stack = separated(whole, experts)
    able = [f for f in families("x86") if f.supports(problem, target) and isinstance(f, ExpertFamily)]
    assert able
    for family in able:
        config = small(family.configs(problem, target)[0])
        product = ExpertProduct(family, problem, config, experts, repeat)
        packed = product.pack(stack)
        function = tvm.compile(product.build(target, "kernel"), target=target.tvm())["kernel"]
        linear = tvm.compile(family.build(problem, config, target, "kernel"), target=target.tvm())["kernel"]
        for count in (1, *tokens):
            ids = rng.integers(-experts, experts, count * repeat)
            if problem.activation.bits:
                x = [rng.integers(1, 256, (count, k)).astype(np.uint8), rng.uniform(0.1, 1, count).astype(np.float32)]
            else:
                x = [rng.standard_normal((count, k)).astype(np.float32)]
            order, start = SortSlots(experts).reference(ids)
            out = arrays((len(ids), n), np.float32)
            scratch = [arrays((len(ids), *lead), dtype) for lead, dtype in product.scratch]
            function(*x, order, start, *packed.values(), out, *scratch)
            token = np.arange(len(ids)) // repeat
            for e in np.unique(ids % experts):
                mine = np.flatnonzero(ids % experts == e)
                want = arrays((len(mine), n), np.float32)
                linear(*(a[token[mine]] for a in x), *family.pack(problem, config, stack[e]).values(), want)
                np.testing.assert_array_equal(out[mine], want)
                exact = family.reference(problem, x[0][token[mine]], x[1][token[mine]] if x[1:] else None, stack[e])
                np.testing.assert_allclose(out[mine], exact, atol=2e-2 * np.abs(exact).max() + 1e-3)
