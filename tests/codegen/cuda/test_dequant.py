"""Every dequantizer, executed on numpy registers over packed random codes: what the tensor cores would be given."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qcompile.codegen.kernels.cuda import dequant, tables
from qcompile.codegen.kernels.cuda.layout import BLOCK, TILE, FragmentLayout, table_words
from qcompile.formats.floats import minifloat_table

from . import emulator

LANE = np.arange(32)
G, THREAD = LANE // 4, LANE % 4


@pytest.fixture(autouse=True)
def registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ptx", "u32", "T", "Registers"):
        for module in (dequant, tables):
            monkeypatch.setattr(module, name, getattr(emulator, name))


def words_of(layout: FragmentLayout, codes: np.ndarray) -> list[np.ndarray]:
    """Per plane the words of every lane, ``[vector, word, lane]``, of one block of one channel tile."""
    found = []
    for plane, data in zip(layout.planes, layout.pack(codes), strict=True):
        found.append(data.view(np.uint32).reshape(plane.vectors, 32, plane.vector // 4).transpose(0, 2, 1))
    return found


def operands(layout: FragmentLayout, codes: np.ndarray, dequantizer: object) -> list[tuple[int, int, int, np.ndarray]]:
    """(unit, tile, register, words of all lanes) of a block."""
    words, found = words_of(layout, codes), []
    for unit in range(layout.units):
        for tile in range(2):
            vectors = layout.planes[0].vectors
            vector = (2 * unit + tile) * vectors // (2 * layout.units)
            low = [emulator.Word(w) for w in words[0][vector]]
            high = [emulator.Word(w) for w in words[1][0]] if len(words) > 1 else None
            out = emulator.Registers((4,))
            dequantizer.tile(out, low, high, unit, tile)
            found += [(unit, tile, r, np.broadcast_to(out[r].bits, 32)) for r in range(4)]
    return found


def positions(layout: FragmentLayout, unit: int, tile: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """K and channel of the elements of a register, ``[lane, element]`` and ``[lane]``."""
    h, a, per = r // 2, r % 2, layout.elements
    k = unit * layout.unit + (2 * tile + h) * 4 * per + THREAD[:, None] * per + np.arange(per)
    return k, G + 8 * a


def pair(channel: np.ndarray, values: np.ndarray, dtype: type) -> emulator.Word:
    """Register with the values of channels g and g + 8 of every lane."""
    raw = values.astype(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
    return emulator.Word(raw[G] | raw[G + 8] << 16)


def halves(bits: np.ndarray, dtype: type) -> np.ndarray:
    return np.stack([bits & 0xFFFF, bits >> 16], -1).astype(np.uint16).view(dtype).astype(np.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scaled(bits: int, bf16: bool, grouped: bool, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    layout, dtype = FragmentLayout(bits, False), ml_dtypes.bfloat16 if bf16 else np.float16
    codes = rng.integers(0, 1 << bits, (BLOCK, TILE))
    scale = rng.uniform(0.1, 1, TILE).astype(np.float16)
    zero = rng.integers(0, 1 << bits, TILE) if not symmetric else np.full(TILE, 1 << bits - 1)
    d = dequant.ScaledDequantizer(bits, bf16, grouped, symmetric)
    channels = np.arange(TILE)
    d.begin(pair(channels, scale, np.float16) if grouped else None, None if symmetric else pair(channels, zero, dtype))
    for unit, tile, r, word in operands(layout, codes, d):
        k, n = positions(layout, unit, tile, r)
        exact = (codes[k, n[:, None]] - zero[n][:, None]).astype(np.float64) * 2.0**-d.exponent
        want = exact * scale[n][:, None].astype(np.float64) if grouped else exact
        got = halves(word, dtype)
        step = (2.0**-7 if bf16 else 2.0**-11) * 1.01 * grouped  # bf16 rounds the scale and the product
        assert (np.abs(got - want) <= step * np.abs(want)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_raw_codes_are_subnormal(bits: int) -> None:
    layout = FragmentLayout(bits, False)
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (BLOCK, TILE))
    for unit, tile, r, word in operands(layout, codes, dequant.RawDequantizer(bits)):
        k, n = positions(layout, unit, tile, r)
        got = halves(word, np.float16) * 2.0 ** (24 - dequant.raw_place(bits, r % 2))
        assert np.array_equal(got, codes[k, n[:, None]])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers(bits: int, symmetric: bool) -> None:
    if bits == 8 and not symmetric:
        pytest.skip("no such kernel")
    rng = np.random.default_rng(bits)
    layout = FragmentLayout(bits, True)
    codes = rng.integers(0, 1 << bits, (BLOCK, TILE))
    zero = rng.integers(0, 1 << bits, TILE)
    d = dequant.IntegerDequantizer(bits, None if symmetric else emulator.Registers((2,)))
    both = (zero * 0x0101).astype(np.uint32)
    d.begin(None, None if symmetric else emulator.Word(both[G] | both[G + 8] << 16))
    for unit, tile, r, word in operands(layout, codes, d):
        k, n = positions(layout, unit, tile, r)
        got = np.stack([word >> 8 * e & 255 for e in range(4)], -1).astype(np.uint8).view(np.int8).astype(int)
        code = codes[k, n[:, None]]
        signed = np.where(code >> bits - 1, code - (1 << bits), code) << 8 - bits
        assert np.array_equal(got, signed if symmetric else code - zero[n][:, None])


NARROW = "float8_e4m3fn"
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, NARROW: ml_dtypes.float8_e4m3fn}


def elements(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers in the registers of all lanes, ``[lane, element]``."""
    return np.ascontiguousarray(bits).view(TYPES[dtype]).reshape(32, -1).astype(np.float64)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_tables(dtype: str) -> None:
    rng = np.random.default_rng(1)
    layout = FragmentLayout(4, dtype == NARROW, dtype != NARROW)
    levels = rng.uniform(-1, 1, 16).astype(TYPES[dtype]).astype(np.float32)
    codes = rng.integers(0, 16, (BLOCK, TILE))
    registers = emulator.Registers((8,))
    for i, word in enumerate(table_words(levels, dtype)):
        registers[i] = emulator.Word(word)
    dequantizer = tables.TableDequantizer(1 if dtype == NARROW else 2, registers)
    for unit, tile, r, bits in operands(layout, codes, dequantizer):
        k, n = positions(layout, unit, tile, r)
        assert np.array_equal(elements(bits, dtype), levels[codes[k, n[:, None]]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tables_of_pairs(dtype: str) -> None:
    rng = np.random.default_rng(4)
    layout = FragmentLayout(4, False, True)
    levels = rng.uniform(-1, 1, 16).astype(TYPES[dtype]).astype(np.float32)
    codes = rng.integers(0, 16, (BLOCK, TILE))
    registers, pairs = emulator.Registers((8,)), emulator.Registers((4,))
    for i, word in enumerate(table_words(levels, dtype)):
        registers[i] = emulator.Word(word)
    shared = np.zeros(256 * 32, np.uint32)
    for index in range(64):
        tables.pairs_of(tables.TableDequantizer(2, registers), pairs, emulator.u32(index))
        for r in range(4):
            shared[(4 * index + r) * 32 :][:32] = pairs[r].bits
    dequantizer = tables.PairDequantizer(lambda place: emulator.Word(shared[place.bits + LANE]))
    for unit, tile, r, bits in operands(layout, codes, dequantizer):
        k, n = positions(layout, unit, tile, r)
        assert np.array_equal(elements(bits, dtype), levels[codes[k, n[:, None]]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("grouped", [False, True])
def test_float8_codes(dtype: str, grouped: bool) -> None:
    rng = np.random.default_rng(2)
    layout, table = FragmentLayout(8, False), np.nan_to_num(minifloat_table(4, 3))
    codes, scale = rng.integers(0, 256, (BLOCK, TILE)), np.exp2(rng.integers(-3, 1, TILE)).astype(np.float16)
    codes[codes & 127 == 127] = 0  # NaN
    bf16 = dtype == "bfloat16"
    exponent = 0 if bf16 else tables.FLOAT8_EXPONENT
    dequantizer = tables.ScaledValues(tables.Float8Dequantizer(bf16), bf16, grouped, exponent)
    dequantizer.begin(pair(G, scale, np.float16) if grouped else None, None)
    for unit, tile, r, bits in operands(layout, codes, dequantizer):
        k, n = positions(layout, unit, tile, r)
        want = table[codes[k, n[:, None]]] * (scale[n][:, None] if grouped else 1) / 2.0**exponent
        assert np.array_equal(elements(bits, dtype), want)


def test_dual_grained_codes_are_exact_int8() -> None:
    rng = np.random.default_rng(3)
    layout = FragmentLayout(4, True)
    codes, factor = rng.integers(-8, 8, (BLOCK, TILE)), rng.integers(1, 16, TILE)
    dequantizer = tables.DualDequantizer(emulator.Registers((2,)))
    dequantizer.begin(emulator.Word(factor[G] | factor[G + 8] << 16))
    for unit, tile, r, bits in operands(layout, codes + 8, dequantizer):
        k, n = positions(layout, unit, tile, r)
        got = np.ascontiguousarray(bits).view(np.int8).reshape(32, 4)
        assert np.array_equal(got, codes[k, n[:, None]] * factor[n][:, None])
