"""Attention against float64 numpy: layouts, grouped heads, masks, causality, any length and head width."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.cpu.append import Append
from qcompile.codegen.kernels.cpu.attention import Attention
from qcompile.codegen.kernels.x86.harness import TARGETS, run, unaligned
from qcompile.errors import TargetError
from qcompile.targets.target import Target

LENGTHS = [(1, 1, 1), (2, 5, 9), (1, 37, 37), (2, 70, 300), (1, 1, 600)]


def inputs(kernel: Attention, b: int, s: int, t: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    extents = {"B": b, "S": s, "T": t}
    made = []
    for p in kernel.params[:-1]:
        shape = tuple(extents.get(e, e) if isinstance(e, str) else e for e in p.shape)
        if p.name != "mask":
            made.append(rng.standard_normal(shape).astype(np.float32))
        elif p.dtype == "float32":
            made.append(np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape)).astype(np.float32))
        else:
            made.append((rng.random(shape) < 0.7).astype(p.dtype))
    return made


def check(kernel: Attention, target: Target, b: int, s: int, t: int, *arrays: np.ndarray) -> np.ndarray:
    arrays = arrays or tuple(inputs(kernel, b, s, t, s))
    got = run(kernel, target, {"B": b, "S": s, "T": t}, *arrays)["o"]
    want = kernel.reference(*arrays)["o"]
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    return got


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kernel", [Attention(3, 32), Attention(4, 64, kv_heads=2), Attention(2, 80)], ids=str)
def test_merged_projections(kernel: Attention, target: Target) -> None:
    for b, s, _ in LENGTHS:
        check(kernel, target, b, s, s)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dims", [(7, 7), (20, 20), (33, 50), (128, 64)])
def test_any_head_width(dims: tuple[int, int], target: Target) -> None:
    kernel = Attention(2, dims[0], value_dim=dims[1], layout="rows", scale=0.3)
    for lengths in LENGTHS:
        check(kernel, target, *lengths)


@pytest.mark.parametrize("axes", [(True, False, False), (False, True, False), (True, True, True), (False, False, True)])
@pytest.mark.parametrize("mask", ["float", "bool"])
def test_masks(mask: str, axes: tuple[bool, bool, bool]) -> None:
    kernel = Attention(4, 16, kv_heads=2, layout="heads", mask=mask, mask_axes=axes)
    for i, lengths in enumerate(LENGTHS):
        check(kernel, TARGETS[i % len(TARGETS)], *lengths)


@pytest.mark.parametrize("mask", ["float", "bool"])
@pytest.mark.parametrize("room", [0, 1, 37])
def test_a_cache_is_read_up_to_its_length(mask: str, room: int) -> None:
    whole = Attention(4, 20, kv_heads=2, layout="heads", mask=mask, mask_axes=(True, False, True))
    kernel = Attention(4, 20, kv_heads=2, layout="cache", mask=mask, mask_axes=(True, False, True))
    for i, (b, s, t) in enumerate(LENGTHS):
        q, k, v, visible = inputs(whole, b, s, t, i)
        wide = [np.concatenate([a, np.full((b, 2, room, 20), np.nan, np.float32)], 2) for a in (k, v)]
        got = run(kernel, TARGETS[i % len(TARGETS)], {"B": b, "S": s}, q, *wide, visible)["o"]
        np.testing.assert_allclose(got, kernel.reference(q, *wide, visible)["o"], atol=2e-5, rtol=2e-5)
        np.testing.assert_array_equal(
            got, run(whole, TARGETS[i % len(TARGETS)], {"B": b, "S": s}, q, k, v, visible)["o"]
        )


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(0, 3), s=st.integers(0, 5), before=st.integers(0, 9), room=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_what_is_appended_lies_behind_what_was_there(b: int, s: int, before: int, room: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = Append(3, (8, 20, 33)[seed % 3], total_rank=4, axis=2, total_dtype="bool")
    cache = rng.standard_normal((b, 3, before + s + room, kernel.width)).astype(np.float32)
    new = rng.standard_normal((b, 3, s, kernel.width)).astype(np.float32)
    total = np.zeros((b, 1, before + s, 1), bool)
    expected = kernel.reference(cache, new, total)["cache"]
    np.testing.assert_array_equal(expected[:, :, before : before + s], new)
    if cache.size and new.size and total.size:
        run(kernel, TARGETS[seed % len(TARGETS)], {}, cache, new, total)
        np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("s, t, c", [(1, 9, 8), (3, 2, 8)])
def test_a_cache_without_room_is_refused(s: int, t: int, c: int) -> None:
    kernel, cache = Append(2, 8), np.zeros((1, 2, c, 8), np.float32)
    with pytest.raises(IndexError, match="no room"):
        run(kernel, TARGETS[0], {}, cache, np.ones((1, 2, s, 8), np.float32), np.zeros((1, t), np.int64))
    assert not cache.any()


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "float32"])
def test_key_padding(dtype: str) -> None:
    kernel = Attention(2, 32, mask="keys", keys_dtype=dtype)
    for i, (b, s, _) in enumerate(LENGTHS):
        check(kernel, TARGETS[i % len(TARGETS)], b, s, s)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("causal", ["upper_left", "lower_right"])
def test_causal(causal: str, target: Target) -> None:
    kernel = Attention(2, 24, layout="rows", causal=causal)
    for lengths in [*LENGTHS, (1, 300, 300), (1, 40, 7)]:
        check(kernel, target, *lengths)
    check(Attention(2, 24, causal=causal, mask="keys"), target, 2, 50, 50)


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_fully_masked_rows_are_uniform(value: float) -> None:
    kernel = Attention(2, 16, layout="rows", mask="float", mask_axes=(True, False, True))
    for s, t in ((3, 20), (5, 300)):
        q, k, v, mask = inputs(kernel, 2, s, t)
        mask[:, :, 1] = value
        for target in TARGETS:
            got = check(kernel, target, 2, s, t, q, k, v, mask)
            np.testing.assert_allclose(got[:, 1], v.mean(1), atol=1e-5)
    keys = Attention(2, 16, layout="rows", mask="keys")
    q, k, v, visible = inputs(keys, 2, 3, 20)
    visible[0] = 0
    np.testing.assert_allclose(check(keys, TARGETS[0], 2, 3, 20, q, k, v, visible)[0, 2], v[0].mean(0), atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    kernel = Attention(1, 8, layout="rows")
    q, k, v = inputs(kernel, 1, 4, 40)
    for target in TARGETS:
        got = run(kernel, target, {"B": 1, "S": 4}, q * 100, k * 100, v)["o"]
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, kernel.reference(q * 100, k * 100, v)["o"], atol=1e-3)


def test_parallel_equals_serial() -> None:
    kernel = Attention(2, 32, kv_heads=1, causal="lower_right")
    (x,) = inputs(kernel, 1, 500, 500)
    threaded = Target("x86", TARGETS[0].cpu, TARGETS[0].features, cores=8)
    serial, parallel = (run(kernel, t, {"B": 1, "S": 500}, x)["o"] for t in (TARGETS[0], threaded))
    np.testing.assert_array_equal(serial, parallel)


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3), s=st.integers(1, 70), t=st.integers(1, 300), offset=st.integers(0, 15), seed=st.integers(0, 99)
)
def test_any_lengths_and_alignment(b: int, s: int, t: int, offset: int, seed: int) -> None:
    kernel = Attention(2, 12, layout="rows", mask="float", mask_axes=(False, False, True), causal="lower_right")
    arrays = [unaligned(a, offset) for a in inputs(kernel, b, s, t, seed)]
    check(kernel, TARGETS[seed % len(TARGETS)], b, s, t, *arrays)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2},
        {"layout": "bshd"},
        {"layout": "cache"},
        {"mask": "additive"},
        {"causal": "yes"},
        {"head_dim": 0},
    ],
)
def test_refuses_what_it_cannot_compute(options: dict) -> None:
    with pytest.raises(TargetError):
        Attention(**{"heads": 3, "head_dim": 8, **options})
