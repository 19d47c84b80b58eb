"""Packing, and the kernels' register arithmetic executed in numpy: what a warp computes from the packed bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE, FragmentLayout, pack_meta, split_scales
from qcompile.codegen.kernels.cuda.stream import StreamLinear, StreamLinearInt8
from qcompile.codegen.kernels.cuda.tiled import TiledLinear
from qcompile.formats import ActivationFormat, IntFormat, parse_format
from qcompile.targets.cuda import TARGETS

FLOATS, INTEGERS = (2, 3, 4, 8), (2, 4, 8)
KINDS = [(b, False) for b in FLOATS] + [(b, True) for b in INTEGERS]
kinds = st.sampled_from(KINDS)


@given(kinds, st.integers(1, 300), st.integers(1, 50), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_round_trip(kind: tuple[int, bool], k: int, n: int, seed: int) -> None:
    layout = FragmentLayout(*kind)
    codes = np.random.default_rng(seed).integers(0, 1 << kind[0], (k, n)).astype(np.uint8)
    packed = layout.pack(codes)
    assert np.array_equal(layout.unpack(packed, k, n), codes)
    assert sum(p.size for p in packed) * 8 == np.prod(layout.padded(k, n)) * kind[0]


def lane_words(layout: FragmentLayout, packed: list[np.ndarray], tiles: int, blocks: int) -> list[np.ndarray]:
    """Per plane: the 32-bit words of every lane, ``[tile, block, vector, lane, word]``, as the kernel's loads see them."""
    words = []
    for plane, data in zip(layout.planes, packed, strict=True):
        shape = (tiles, blocks, plane.vectors, 32, plane.vector // 4)
        words.append(data.view(np.uint32).reshape(shape).astype(np.int64))
    return words


def registers(layout: FragmentLayout, words: list[np.ndarray], unit: int, tile: int, r: int) -> np.ndarray:
    """Codes in operand register ``r``: ``[tile, block, lane, element]``, by the bit positions `dequant` uses."""
    bits, low = layout.bits, words[0]
    if layout.integer:
        if bits == 8:
            return np.stack([low[:, :, 2 * unit + tile, :, r] >> 8 * e & 255 for e in range(4)], -1)
        word = low[:, :, unit, :, 2 * tile + r // 2] if bits == 4 else low[:, :, 0, :, 2 * unit + tile]
        at = 4 * (r % 2) if bits == 4 else 2 * r
        top = (word << 8 - bits - at) & 0xFFFFFFFF & (0xFF << 8 - bits & 0xFF) * 0x01010101
        return np.stack([(top >> 8 * e & 255) >> 8 - bits for e in range(4)], -1)
    if bits == 8:
        word = low[:, :, unit, :, 2 * tile + r // 2]
        return np.stack([word >> 8 * (2 * (r % 2) + e) & 255 for e in range(2)], -1)
    if bits == 4:
        word, at, width = low[:, :, unit // 2, :, 2 * (unit % 2) + tile], 4 * r, 4
    else:
        word, at, width = low[:, :, 0, :, unit], 8 * tile + 2 * r, 2
    codes = np.stack([word >> at + 16 * e & (1 << width) - 1 for e in range(2)], -1)
    if bits == 3:
        high = words[1][:, :, 0, :, unit // 2]
        codes |= np.stack([high >> 8 * (unit % 2) + 4 * tile + r + 16 * e & 1 for e in range(2)], -1) << 2
    return codes


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fragments_give_the_product(kind: tuple[int, bool]) -> None:
    """Emulates mma.m16n8: operand registers from packed words and from rows of x, sums where the ISA puts them."""
    layout = FragmentLayout(*kind)
    rng = np.random.default_rng(kind[0])
    k, n, m = 2 * BLOCK, 2 * TILE, 8
    codes, x = rng.integers(0, 1 << kind[0], (k, n)), rng.integers(-9, 10, (m, k))
    tiles, blocks, e = n // TILE, k // BLOCK, layout.elements
    words = lane_words(layout, layout.pack(codes), tiles, blocks)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    y = np.zeros((m, n), np.int64)
    for unit in range(layout.units):
        for tile in range(2):
            a = np.zeros((tiles, blocks, 16, 8 * e), np.int64)  # 16 channels by the positions of the mma
            b = np.zeros((blocks, 8 * e, 8), np.int64)
            for r in range(4):
                value = registers(layout, words, unit, tile, r)
                for i in range(e):
                    a[:, :, g + 8 * (r % 2), r // 2 * 4 * e + e * t + i] = value[..., i]
            for h in range(2):
                for i in range(e):
                    for block in range(blocks):
                        chunk = (2 * tile + h) * 4 * e
                        position = block * BLOCK + unit * layout.unit + chunk + e * t + i
                        b[block, h * 4 * e + e * t + i, g] = x[g, position]
            y += np.einsum("tbck,bkm->mtc", a, b).reshape(m, n)
    assert np.array_equal(y, x @ codes)


@given(st.integers(1, 5), st.integers(1, 40), st.booleans())
@settings(max_examples=20, deadline=None)
def test_meta_places(groups: int, n: int, bf16: bool) -> None:
    rng = np.random.default_rng(groups * 100 + n)
    scale = rng.random((groups, n)).astype(np.float16)
    zero = rng.integers(0, 256, (groups, n))
    tiles = -(-n // TILE)
    meta = (
        pack_meta(scale, zero, groups, n, "bfloat16" if bf16 else "float16")
        .view(np.uint16)
        .reshape(tiles, groups, 8, 2, 2)
    )
    for column in range(n):
        tile, a, g = column // 16, column % 16 // 8, column % 8
        assert np.array_equal(meta[tile, :, g, 0, a].view(np.float16), scale[:, column])
        stored = meta[tile, :, g, 1, a]
        real = (stored.astype(np.uint32) << 16).view(np.float32) if bf16 else stored.view(np.float16)
        assert np.array_equal(real.astype(np.int64), zero[:, column])


def test_split_scales_keep_eleven_bits() -> None:
    scale = (np.random.default_rng(0).standard_normal((6, 9)) * np.logspace(-30, 30, 9)).astype(np.float32)
    stored, column = split_scales(scale)
    assert np.abs(stored).max() <= 1
    assert (np.abs(stored * column.astype(np.float64) - scale) <= 2.0**-11 * np.abs(scale) + 2.0**-25 * column).all()


FLOAT = ActivationFormat()


def problem(weight: str, activation: ActivationFormat = FLOAT, k: int = 1024, n: int = 512) -> LinearProblem:
    return LinearProblem(k, n, parse_format(weight), activation, m=1)


def test_refusals_name_the_reason() -> None:
    target, act = TARGETS["sm_80"], ActivationFormat(8)
    assert "groups of 16" in StreamLinear().supports(problem("int4/g48"), target).reason
    assert "bits" in StreamLinear().supports(problem("int5"), target).reason
    assert "float activations" in StreamLinear().supports(problem("int4", act), target).reason
    assert "symmetric" in StreamLinearInt8().supports(problem("int8/asym", act), target).reason
    assert "integer activations" in StreamLinearInt8().supports(problem("int4"), target).reason
    assert "2 GiB" in StreamLinear().supports(problem("int8", k=1 << 16, n=1 << 15), target).reason
    assert not StreamLinear().supports(LinearProblem(64, 64, IntFormat(4), ActivationFormat()), parse_x86())


def parse_x86():
    from qcompile.targets import get_target

    return get_target("x86-64-v3")


@pytest.mark.parametrize("arch", list(TARGETS))
@pytest.mark.parametrize("m", [1, 16, 64])
def test_configs_fit_the_chip(arch: str, m: int) -> None:
    p = LinearProblem(4096, 4096, parse_format("int4/g128"), ActivationFormat(), m=m)
    for family in (StreamLinear(), TiledLinear()):
        configs = family.configs(p, TARGETS[arch])
        assert configs
        for c in configs:
            s = family.shape(p, c)
            assert s.shared_bytes <= TARGETS[arch].shared
            assert s.grid_n * s.columns >= p.n
            assert s.threads <= 1024
    for c in StreamLinear().configs(p, TARGETS[arch]):
        s = StreamLinear().shape(p, c)
        assert s.split * s.kw * s.per_warp >= s.blocks and s.rows >= min(m, 16)
