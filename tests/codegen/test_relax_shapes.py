"""Dynamic shapes: one compiled program serves every batch size and length, and refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.codegen.relax.testing import Compiled, check, parse

RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_shape_arithmetic_gives_symbolic_shapes_not_run_time_ones() -> None:
    model = Compiled(
        parse(
            """g (float[batch, seq, 12] x) => (float[batch, seq, 3, 4] y) {
              s = Shape<start=0, end=2>(x)
              tail = Constant<value_ints=[3, 4]>()
              shape = Concat<axis=0>(s, tail)
              y = Reshape(x, shape)
            }"""
        )
    )
    assert model.program.outputs[0].shape == ("batch", "seq", 3, 4)
    assert "tensor_to_shape" not in model.program.mod.script()
    for batch, seq in ((1, 1), (2, 5), (4, 3)):
        model.check(f32(batch, seq, 12))


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 4), (0, 5)])
def test_one_program_for_all_sizes(shape: tuple[int, int]) -> None:
    model = Compiled(
        parse(
            """g (float[batch, seq] x) => (float[batch, seq] y) {
              s = Shape(x)
              zero = Constant<value_int=0>()
              one = Constant<value_int=1>()
              n = Gather<axis=0>(s, one)
              r = Range(zero, n, one)
              f = Cast<to=1>(r)
              e = Expand(f, s)
              y = Add(x, e)
            }"""
        )
    )
    model.check(f32(*shape))


def test_past_plus_present_is_a_sum_of_dimensions() -> None:
    model = Compiled(
        parse(
            """g (float[past, 4] p, float[seq, 4] x) => (float[total, 4] y, float[total, total] m) {
              y = Concat<axis=0>(p, x)
              t = Transpose(y)
              m = MatMul(y, t)
            }"""
        )
    )
    assert model.program.outputs[0].shape == ("past + seq", 4)
    model.check(f32(3, 4), f32(2, 4))
    model.check(f32(1, 4), f32(6, 4))


def test_dimensions_that_may_be_one_broadcast_at_run_time() -> None:
    model = Compiled(parse("g (float[a, 3] x, float[b, 3] y) => (float[c, 3] z) { z = Mul(x, y) }"))
    model.check(f32(4, 3), f32(4, 3))
    model.check(f32(1, 3), f32(4, 3))
    model.check(f32(4, 3), f32(1, 3))
    with pytest.raises(RuntimeError, match="match_cast"):
        model(f32(2, 3), f32(4, 3))


def test_mismatched_inner_dimensions_stop_the_program() -> None:
    model = Compiled(parse("g (float[a, n] x, float[m, b] y) => (float[a, b] z) { z = MatMul(x, y) }"))
    model.check(f32(2, 5), f32(5, 3))
    with pytest.raises(RuntimeError, match="match_cast"):
        model(f32(2, 5), f32(4, 3))


def test_a_stated_dimension_is_taken_and_checked() -> None:
    """The model says that ``min(seq, 8)`` rows are ``seq`` rows; a longer input is an error, not a wrong result."""
    model = Compiled(
        parse(
            """g (float[seq, 4] x) => (float[seq, 4] y) <float[seq, 4] rows> {
              t = Constant<value = float[8, 4] {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                                21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31}>()
              zero = Constant<value_ints=[0]>()
              n = Shape<start=0, end=1>(x)
              rows = Slice(t, zero, n)
              y = Add(x, rows)
            }"""
        )
    )
    assert model.program.outputs[0].shape == ("seq", 4)
    model.check(f32(3, 4))
    model.check(f32(8, 4))
    with pytest.raises(RuntimeError, match="match_cast"):
        model(f32(9, 4))


@pytest.mark.parametrize("wanted", [[3, 4], [-1, 2], [0, -1], [2, 6]])
def test_reshape_to_a_shape_known_at_run_time(wanted: list[int]) -> None:
    check(
        "g (float[n, 6] x, int64[2] s) => (float[a, b] y) { e = Exp(x) r = Reshape(e, s) y = Neg(r) }",
        f32(2, 6),
        np.array(wanted),
    )


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([1], [4], [0], [1]),
        ([-3], [100], [1], [1]),
        ([5], [-100], [0], [-2]),
        ([0, 4], [2, 0], [0, 1], [1, -1]),
        ([3], [3], [0], [1]),
    ],
)
def test_slices_known_at_run_time(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    n = len(starts)
    check(
        f"g (float[r, 5] x, int64[{n}] a, int64[{n}] b, int64[{n}] c, int64[{n}] d) => (float[p, q] y) "
        "{ z = Slice(x, a, b, c, d) y = Neg(z) }",
        f32(6, 5),
        np.array(starts),
        np.array(ends),
        np.array(axes),
        np.array(steps),
    )


@pytest.mark.parametrize("axes", [[0], [1], [-1], [0, 2], [2, 1, 0]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_known_at_run_time(axes: list[int], keepdims: int) -> None:
    rank = 3 if keepdims else 3 - len(axes)
    out = ", ".join(f"d{i}" for i in range(rank))
    check(
        f"g (float[a, b, 4] x, int64[{len(axes)}] axes) => (float[{out}] y) "
        f"{{ e = Exp(x) s = ReduceSum<keepdims={keepdims}>(e, axes) y = Log(s) }}",
        f32(2, 3, 4),
        np.array(axes),
    )


def test_an_axis_out_of_range_at_run_time_is_an_error() -> None:
    model = Compiled(parse("g (float[2, 3] x, int64[1] axes) => (float[a] y) { y = ReduceSum<keepdims=0>(x, axes) }"))
    model.check(f32(2, 3), np.array([1]))
    with pytest.raises(RuntimeError, match="an axis is outside"):
        model(f32(2, 3), np.array([2]))


def test_sizes_that_depend_on_the_data() -> None:
    body = """g (float[n, m] x) => (float[k] y, int64[u] distinct) {
      zero = Constant<value_float=0.0>()
      p = Greater(x, zero)
      index = NonZero(p)
      t = Transpose(index)
      v = GatherND(x, t)
      y = Mul(v, v)
      c = Ceil(y)
      i = Cast<to=7>(c)
      distinct = Unique(i)
    }"""
    model = Compiled(parse(body))
    model.check(f32(3, 4))
    model.check(np.full((2, 2), -1, np.float32))
    model.check(np.abs(f32(5, 1)))


def test_work_before_a_run_time_dimension_is_not_fused_past_its_definition() -> None:
    check(
        """g (float[1, 2] x, float[3, 4] s) => (float[a, b] y) {
          q, r = Split<axis=1, num_outputs=2>(x)
          z = NonZero(s)
          c = Shape(z)
          e = Expand(q, c)
          y = Neg(e)
        }""",
        f32(1, 2),
        f32(3, 4),
    )


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceLogSumExp"])
def test_reductions_over_nothing_give_the_identity(op: str) -> None:
    model = Compiled(
        parse(f"g (float[n, 3] x) => (float[3] y) {{ a = Constant<value_ints=[0]>() y = {op}<keepdims=0>(x, a) }}")
    )
    model.check(f32(4, 3))
    got = model(np.zeros((0, 3), np.float32))[0]
    wanted = {"ReduceSum": 0, "ReduceProd": 1, "ReduceMax": -np.inf, "ReduceMin": np.inf, "ReduceMean": np.nan}
    np.testing.assert_array_equal(got, np.full(3, wanted.get(op, -np.inf), np.float32))


def test_a_matrix_product_over_an_empty_dimension_is_zero() -> None:
    model = Compiled(parse("g (float[2, n] x, float[n, 3] y) => (float[2, 3] z) { z = MatMul(x, y) }"))
    model.check(f32(2, 4), f32(4, 3))
    np.testing.assert_array_equal(model(f32(2, 0), f32(0, 3))[0], np.zeros((2, 3), np.float32))
