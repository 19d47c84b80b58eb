"""What every format promises, checked for every registered family and for odd shapes, groups and magnitudes."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError
from qcompile.formats import Format, IntFormat, list_formats, parse_format

SPELLINGS = [
    "int8", "int4/g32", "int4/asym", "int3/g7/asym", "int2/g16", "int2/g16/asym", "int1/g8", "int1/asym", "int6/g5",
    "ternary/channel", "ternary/g9", "ternary/g9/median", "nf4/g64", "nf3", "nf2/g8", "e2m1/g16", "e2m3", "e3m2/g10",
    "e4m3", "e5m2/g32", "e3m0/g16", "e1m2", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "fixed<8,3>", "fixed<6>",
    "fixed<4,-2>", "pow2sum1/g16", "pow2sum2", "codebook4/g32", "codebook2/g8", "codebook3", "bitplane1/g16",
    "bitplane2/g16", "bitplane3", "bitplane4/g8", "dual4/g16", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
]  # fmt: skip

formats = pytest.mark.parametrize("spelling", SPELLINGS)


@st.composite
def weights(draw, max_k=50, max_n=6):
    k, n = draw(st.integers(1, max_k)), draw(st.integers(1, max_n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((k, n)) * 10.0 ** draw(st.integers(-6, 6))
    weight[:, rng.random(n) < draw(st.sampled_from([0.0, 0.3]))] = draw(st.sampled_from([0.0, 1.0, -0.25]))
    weight[rng.random(k) < draw(st.sampled_from([0.0, 0.2]))] = 0
    return weight.astype(np.float32)


def relative_error(weight, decoded):
    return np.square(weight - decoded, dtype=np.float64).sum() / max(np.square(weight, dtype=np.float64).sum(), 1e-300)


@formats
def test_spelling_round_trips(spelling):
    fmt = parse_format(spelling)
    assert parse_format(str(fmt)) == fmt
    assert hash(parse_format(str(fmt))) == hash(fmt)


@formats
@settings(max_examples=15, deadline=None)
@given(weight=weights())
def test_encode_decode(spelling, weight):
    fmt = parse_format(spelling)
    quantized = fmt.encode(weight)
    decoded = fmt.decode(quantized)
    assert decoded.dtype == np.float32 and decoded.shape == quantized.codes.shape == weight.shape
    assert quantized.codes.dtype in (np.int8, np.uint8)
    assert np.isfinite(decoded).all() and np.isfinite(quantized.scale).all()
    # Rounding what a grid can express, on the same grid, changes nothing.
    again = fmt.quantize(decoded, quantized.grid)
    np.testing.assert_array_equal(fmt.decode(again), decoded)


@formats
@settings(max_examples=15, deadline=None)
@given(weight=weights(max_k=40, max_n=4))
def test_nearest_picks_the_nearest_of_all_codes(spelling, weight):
    fmt = parse_format(spelling)
    grid = fmt.minmax_grid(weight)
    k, n = weight.shape
    rows = fmt.rows(grid, slice(0, k), k)
    chosen = np.abs(weight - fmt.values(fmt.nearest(weight, rows), rows))
    dtype = fmt.nearest(weight, rows).dtype
    codes = np.arange(-(1 << fmt.bits - 1), 1 << fmt.bits - 1) if dtype == np.int8 else np.arange(1 << fmt.bits)
    if spelling.startswith("ternary"):
        codes = np.array([-1, 0, 1])
    best = np.full((k, n), np.inf)
    for code in codes:
        with np.errstate(invalid="ignore"):
            best = np.fmin(best, np.abs(weight - fmt.values(np.full((k, n), code, dtype), rows)))
    tolerance = 1e-5 * np.abs(weight).max() + 1e-30
    assert (chosen <= best + tolerance).all()


@formats
@settings(max_examples=15, deadline=None)
@given(weight=weights(), weighted=st.booleans(), seed=st.integers(0, 9))
def test_search_errs_no_more_than_the_range_grid(spelling, weight, weighted, seed):
    fmt = parse_format(spelling)
    assume(np.abs(weight).max() > 0)
    h = np.random.default_rng(seed).random(weight.shape[0]) + 0.01 if weighted else None
    root = 1 if h is None else np.sqrt(h)[:, None]
    found = fmt.decode(fmt.quantize(weight, fmt.fit_grid(weight, h)))
    plain = fmt.decode(fmt.encode(weight))
    assert relative_error(root * weight, root * found) <= 1.02 * relative_error(root * weight, root * plain) + 1e-9


@formats
def test_search_is_good_on_gaussian_weights(spelling):
    """A ceiling per width on the error relative to the variance, so that a broken search cannot pass."""
    weight = np.random.default_rng(0).standard_normal((256, 32)).astype(np.float32)
    fmt = parse_format(spelling)
    limit = {1: 0.45, 2: 0.22, 3: 0.06, 4: 0.045, 5: 0.02, 6: 0.012, 8: 0.004}[fmt.bits]
    if spelling in ("int1/asym", "int1/g8"):
        limit = 0.85  # half the weights round to zero
    if spelling == "fixed<4,-2>":
        limit = 0.95  # its range is an eighth
    assert relative_error(weight, fmt.decode(fmt.quantize(weight, fmt.fit_grid(weight)))) < limit


@formats
def test_a_better_grid_for_one_group_can_be_put_in_place(spelling):
    fmt = parse_format(spelling)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((48, 6)).astype(np.float32)
    grid = fmt.fit_grid(weight)
    length = fmt.group_length(48)
    last = fmt.groups(48) - 1
    rows = slice(last * length, 48)
    part = fmt.fit_group(weight[rows] * 0.5, np.ones(len(weight[rows])), fmt.rows(grid, rows, 48))
    before = fmt.decode(fmt.quantize(weight, grid))
    after = fmt.decode(fmt.quantize(weight, grid.replace(last, part)))
    np.testing.assert_array_equal(before[: rows.start], after[: rows.start])
    expected = fmt.values(fmt.nearest(weight[rows], part), part)
    np.testing.assert_array_equal(after[rows], expected)


@formats
def test_rows_agree_with_the_whole(spelling):
    fmt = parse_format(spelling)
    weight = np.random.default_rng(2).standard_normal((53, 5)).astype(np.float32)
    quantized = fmt.encode(weight)
    order = np.random.default_rng(3).permutation(53)
    picked = fmt.values(quantized.codes[order], fmt.rows(quantized.grid, order, 53))
    np.testing.assert_array_equal(picked, fmt.decode(quantized)[order])


@formats
def test_rescaling_scales_the_values_or_is_refused(spelling):
    fmt = parse_format(spelling)
    weight = np.random.default_rng(4).standard_normal((40, 3)).astype(np.float32)
    quantized = fmt.encode(weight)
    grid = fmt.rescale(quantized.grid, np.full((fmt.groups(40), 3), 0.5, np.float32))
    if grid is None:
        assert spelling.startswith("fixed")
    elif not spelling.startswith("dual4"):  # its integer scales are bounded
        np.testing.assert_allclose(fmt.decode(grid.with_codes(quantized.codes)), 0.5 * fmt.decode(quantized), rtol=0.07)


@formats
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_magnitudes_survive(spelling, magnitude):
    if spelling.startswith("fixed<8,") or spelling.startswith("fixed<4,"):
        pytest.skip("its range is fixed by its name")
    weight = np.random.default_rng(5).standard_normal((64, 4)).astype(np.float32)
    fmt = parse_format(spelling)
    reference = relative_error(weight, fmt.decode(fmt.encode(weight)))
    scaled = (weight.astype(np.float64) * magnitude).astype(np.float32)
    for grid in (fmt.minmax_grid(scaled), fmt.fit_grid(scaled)):
        decoded = fmt.decode(fmt.quantize(scaled, grid))
        assert relative_error(scaled, decoded) < 3 * reference + 0.02


@formats
def test_zero_weights_stay_zero(spelling):
    fmt = parse_format(spelling)
    weight = np.zeros((20, 3), np.float32)
    for grid in (fmt.minmax_grid(weight), fmt.fit_grid(weight)):
        np.testing.assert_array_equal(fmt.decode(fmt.quantize(weight, grid)), 0)


@formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_with_their_place(spelling, bad):
    weight = np.ones((4, 4), np.float32)
    weight[2, 1] = bad
    with pytest.raises(FormatError, match=rf"weight\[2, 1\] is {bad}"):
        parse_format(spelling).encode(weight)


@pytest.mark.parametrize("weight", [np.ones(4), np.ones((0, 3)), np.ones((2, 2), complex), np.full((2, 2), 1e300)])
def test_what_is_not_a_matrix_of_float32_is_refused(weight):
    with pytest.raises(FormatError):
        IntFormat(4).encode(weight)


@pytest.mark.parametrize(
    "spelling", ["int9", "int0", "int4/g0", "q4", "", "e6m1", "e4m4", "nf1", "nf4/g0", "fixed<9>", "fixed<8,>", "dual4",
                 "bitplane5", "codebook5/g8", "pow2sum3", "ternary/g0", "int4/g32/asym/sym", "mxfp5"]
)  # fmt: skip
def test_unknown_spellings_are_refused(spelling):
    with pytest.raises(FormatError):
        parse_format(spelling)


@pytest.mark.parametrize(("alias", "canonical"), [("fp8", "e4m3"), ("fp4/g32", "e2m1/g32"), ("int4/channel", "int4")])
def test_aliases(alias, canonical):
    assert str(parse_format(alias)) == canonical


def test_the_list_names_each_family_once_with_a_working_example():
    infos = list_formats()
    assert len({info.spelling for info in infos}) == len(infos) >= 12
    for info in infos:
        assert isinstance(info.example, Format)
        assert parse_format(str(info.example)) == info.example
        assert info.description
        assert info.example.bits_per_weight((1024, 1024)) >= 1


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [("int4/g128", 4.125), ("int4/g128/asym", 4.15625), ("mxfp4", 4.25), ("nvfp4", 4.5 + 2**-15), ("nf4/g64", 4.25),
     ("dual4/g128", 4 + 4 / 128 + 16 / 1024), ("bitplane2/g128", 2.375), ("fixed<8>", 8), ("pow2sum1/g16", 4.5),
     ("q2_k", 2.625), ("q3_k", 3.4375), ("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625)],
)  # fmt: skip
def test_bits_per_weight_counts_scales(spelling, bits):
    assert parse_format(spelling).bits_per_weight((1024, 1024)) == pytest.approx(bits)
