"""Slices of activations by packed codes, on numpy registers: fragments of `mma.m16n8k32` as the PTX ISA gives them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.kernels.cuda import slices
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE, FragmentLayout
from qcompile.codegen.kernels.cuda.sliced import EXCHANGE, HALF, QUADS, SLICES, SlicedLinear
from qcompile.codegen.kernels.cuda.slices import Slicer, above, sliced_planes
from qcompile.formats import parse_format
from qcompile.formats.integer import parse_activation
from qcompile.targets.cuda import TARGETS

from . import emulator
from .test_dequant import words_of

LANE = np.arange(32)
G, THREAD = LANE // 4, LANE % 4


@pytest.fixture(autouse=True)
def registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ptx", "u32", "T", "Registers"):
        monkeypatch.setattr(slices, name, getattr(emulator, name))


def exponents(slicer: Slicer, x: np.ndarray) -> tuple[np.float32, np.float32]:
    largest = np.abs(x).max().astype(np.float32).view(np.uint32)
    up, down = slicer.exponent(emulator.Word(largest))
    return up.bits.view(np.float32), down.bits.view(np.float32)


def rows_of(plane: slices.SlicedPlane, slicer: Slicer, x: np.ndarray, up: np.float32) -> np.ndarray:
    """Operand registers of x, ``[quad, lane]``, by way of the shared memory they are exchanged through."""
    k = plane.base(G) + 2 * THREAD
    pairs = [x[k + half * plane.delta + e] for e in range(2) for half in range(2)]
    if not plane.woven:
        pairs = [pairs[0], pairs[2], pairs[1], pairs[3]]
    factor = up * np.exp2(plane.prescale(G)).astype(np.float32)
    out = emulator.Registers((SLICES,))
    slicer.slices(out, [np.asarray(p * factor, np.float32) for p in pairs])
    shared = np.zeros(EXCHANGE, np.uint32)
    for d in range(SLICES):
        place = G // 4 * HALF + THREAD * 4 + G % 4 + 16 * d
        assert len(set(place % 32)) == 32  # no two lanes meet a bank
        shared[place] = out[d].bits
    found = [shared[(G % 4 * 4 + THREAD) * 4 + half * HALF + c] for half in range(2) for c in range(4)]
    return np.stack(found)


def product(weights: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """``[16, 8]`` integers of one `mma.m16n8k32`: unsigned bytes by signed ones, registers ``[lane]``."""
    a, b = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for byte in range(4):
        for r in range(4):
            a[G + 8 * (r % 2), 16 * (r // 2) + 4 * THREAD + byte] = weights[r] >> np.uint32(8 * byte) & 255
        for h in range(2):
            b[16 * h + 4 * THREAD + byte, G] = (rows[h] >> np.uint32(8 * byte) & 255).astype(np.uint8).view(np.int8)
    return a @ b


def sums(bits: int, codes: np.ndarray, x: np.ndarray, constant: int | None = None) -> np.ndarray:
    """``sum code x`` of 16 channels over a block of 128, or of codes that are all ``constant``."""
    layout, slicer = FragmentLayout(bits, False), Slicer(bits)
    up, down = exponents(slicer, x)
    total = np.zeros(TILE)
    for p, (plane, words) in enumerate(zip(sliced_planes(bits), words_of(layout, codes), strict=True)):
        rows = rows_of(plane, slicer, x, up)
        held = [emulator.Word(word) for vector in words for word in vector]
        part = np.zeros((16, 8), np.int64)
        for i in range(QUADS // 2):
            out = emulator.Registers((4,))
            plane.operand(out, held, i)
            if constant is not None:
                for r, word in enumerate(plane.constant(constant, i)):
                    out[r] = emulator.u32(word)
            weights = [np.broadcast_to(out[r].bits, 32) for r in range(4)]
            part += product(weights, rows[2 * i : 2 * i + 2])
        joined = part[:, :SLICES:2] + 256 * part[:, 1:SLICES:2]
        assert np.abs(joined).max() < 1 << 31 and np.array_equal(part[:, :4], part[:, 4:])
        half = np.arange(TILE) // 8
        total += (joined[:, 0] + 65536.0 * joined[:, 1]) * (np.exp2(half) if p else 1)
    row = sliced_planes(bits)[0].row
    unit = np.exp2(-(above(2 if bits == 3 else bits) + row * (np.arange(TILE) // 8)))
    return total * unit * float(down)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 30), spread=st.integers(0, 12), size=st.integers(-20, 15))
def test_products_are_those_of_float64(bits: int, seed: int, spread: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(BLOCK) * np.exp2(size - rng.integers(0, spread + 1, BLOCK))).astype(np.float32)
    x = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 1 << bits, (BLOCK, TILE))
    # x is rounded to 2^-24 of the largest of its block, or better.
    bound = 2.0**-24 * np.abs(x).max() * codes.sum(0) * (0.5 if bits != 3 else 1) + 1e-300
    assert (np.abs(sums(bits, codes, x) - codes.T @ x.astype(np.float64)) <= bound).all()
    for constant in (1, 1 << bits - 1):
        got = sums(bits, codes, x, constant)
        assert np.allclose(
            got, constant * x.astype(np.float64).sum(), rtol=0, atol=2.0**-24 * 128 * constant * np.abs(x).max()
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extremes(bits: int) -> None:
    """Nothing overflows, no sum of a group leaves int32; what is not finite is not lost."""
    codes = np.full((BLOCK, TILE), (1 << bits) - 1)
    for value in (65504, -65504, 3.3e38, -1e-38, 2.0**-24, 0):
        x = np.full(BLOCK, value, np.float32)
        if abs(value) > 1e30:
            x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # a bfloat16
        got, want = sums(bits, codes, x), BLOCK * ((1 << bits) - 1) * float(x[0])
        assert np.allclose(got, want, rtol=2.0**-20, atol=BLOCK * 255 * 2.0**-119)
    for value in (np.inf, np.nan):
        largest = np.array(value, np.float32).view(np.uint32)
        assert np.isnan(Slicer(bits).exponent(emulator.Word(largest))[1].bits.view(np.float32))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [("nf4/g64", "integer"), ("int4/g16", "groups from 32"), ("int3/g32", "groups from 64"), ("int6", "bits")],
)
def test_what_it_does_not_take(weight: str, reason: str) -> None:
    problem = LinearProblem(256, 64, parse_format(weight), parse_activation("none"))
    support = SlicedLinear().supports(problem, TARGETS["sm_90a"])
    assert not support and reason in support.reason
