"""The code of `planes.PlaneLinear`: planes of x from its codes, products by population count."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.dequant import AND_OR
from qcompile.codegen.kernels.cuda.planes import SPAN, PlaneShape
from qcompile.codegen.kernels.cuda.stream_code import Kernel

MMA = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"

ONES = 0x01010101
"""The lowest bit of four codes."""


def emit(shape: PlaneShape, epilogue: Epilogue, name: str) -> Any:
    """The PrimFunc."""
    with e.kernel(name) as builder:
        _Kernel(shape, epilogue).emit()
    return builder.get()


class _Kernel(Kernel):
    """Names of one kernel while it is written; the end is that of `stream_code.Kernel`."""

    s: PlaneShape

    def _parameters(self) -> None:
        s = self.s
        self.m = T.int32()
        self.x = e.argument("x", (self.m, s.x_width), "int8")
        self.x_scale = e.argument("x_scale", (self.m,), "float32")
        self.codes_buffer = e.argument("codes", (s.tiles * s.blocks * s.block_bytes,), "uint8")
        self.offset = e.argument("offset", (s.n,), "int32")
        self.zero_point = e.argument("zero", (s.n,), "int32")
        self._tail_parameters()

    def _registers(self) -> None:
        s = self.s
        self.sum_type = "uint32"
        self.total = e.Registers((s.tn, 1, 4), "uint32")
        self.part = e.Registers((s.tn, s.sums, 4), "uint32")
        self.w = e.Registers((2, s.tn, s.weight.bits, 4), "uint32")
        self.xr = e.Registers((2, 2, 8), "uint32")
        self.planes = e.Registers((s.planes, 2), "uint32")
        self.bits = e.Registers((1,), "uint32")
        self.sum_x = e.Registers((1,), "int32")
        self.sum_x[0] = T.int32(0)
        for j in range(s.tn):
            for i in range(s.sums):
                for c in range(4):
                    self.part[j, i, c] = e.u32(0)

    def _loop(self) -> None:
        s = self.s
        self._positions()
        self._load(0, self.start, self.count > 0)
        with T.serial((self.count + 1) // 2) as pair:
            for half in range(2):
                step = e.let(pair * 2 + half)
                self._load(1 - half, self.start + step + 1, step + 1 < self.count)
                # A step beyond the end was loaded as zeros.
                self._multiply(half)
        self._combine()

    def _load(self, buffer: int, block: Any, valid: Any) -> None:
        """Weights and rows of x of a step into registers; zeros where it is not valid."""
        s = self.s
        for j in range(s.tn):
            for i in range(s.weight.bits):
                for c in range(4):
                    self.w[buffer, j, i, c] = e.u32(0)
        for h in range(2):
            for c in range(8):
                self.xr[buffer, h, c] = e.u32(0)
        with T.If(valid), T.Then():
            for j in range(s.tn):
                for i in range(s.weight.bits):
                    at = (self.tile[j] * s.blocks + block) * s.block_bytes + i * 512 + self.lane * 16
                    words = [self.w[buffer, j, i, c] for c in range(4)]
                    e.ptx("ld.global.nc.v4.b32", *words, self.codes_buffer.ptr_to([at]))
            row = self.lane // 4
            for h in range(2):
                for part in range(2):
                    k = block * SPAN + h * 128 + self.lane % 4 * 32 + part * 16
                    words = [self.xr[buffer, h, part * 4 + c] for c in range(4)]
                    inside = T.And(row < self.rows, k < s.x_width)
                    with T.If(inside), T.Then():
                        e.ptx("ld.global.nc.v4.b32", *words, self.x.ptr_to([self.first_row + row, k]))

    def _multiply(self, buffer: int) -> None:
        s = self.s
        for h in range(2):
            words = [self.xr[buffer, h, c] for c in range(8)]
            for word in words:
                e.ptx("dp4a.s32.s32", self.sum_x[0], T.reinterpret("int32", word), T.int32(ONES), self.sum_x[0])
            for j in range(s.planes):
                self.planes[j, h] = e.u32(0)
                for c, word in enumerate(words):
                    # Bit j of four codes to bit c of their bytes.
                    moved = word >> e.u32(j - c) if j > c else word << e.u32(c - j) if c > j else word
                    self.bits[0] = moved
                    ones = e.u32(ONES << c & 0xFFFFFFFF)
                    e.ptx("lop3.b32", self.planes[j, h], self.bits[0], ones, self.planes[j, h], AND_OR)
            # v = x + 2^(q-1): the top bit of q is the other way round.
            top = s.planes - 1
            self.planes[top, h] = T.bitwise_xor(self.planes[top, h], e.u32(0xFFFFFFFF))
        for j in range(s.tn):
            for i in range(s.weight.bits):
                weights = [self.w[buffer, j, i, c] for c in range(4)]
                for p in range(s.planes):
                    sums = [self.part[j, i + p, c] for c in range(4)]
                    e.ptx(MMA, *sums, *weights, self.planes[p, 0], self.planes[p, 1], *sums)

    def _combine(self) -> None:
        """Sums of products by plane numbers, less zero point times sum of x."""
        s = self.s
        whole = e.let(T.cuda.warp_reduce(self.sum_x[0], "sum", 4))
        # Sums of lane 4 g + t are those of rows 2 t and 2 t + 1.
        row_sum = e.Registers((2,), "uint32")
        for h in range(2):
            source = T.cast(self.lane % 4 * 8 + 4 * h, "uint32")
            bits = T.reinterpret("uint32", whole)
            e.ptx("shfl_sync.idx.b32", row_sum[h], bits, source, e.u32(31), e.u32(0xFFFFFFFF))
        for j in range(s.tn):
            for a in range(2):
                n = T.min(self.tile[j] * 16 + a * 8 + self.lane // 4, s.n - 1)
                zero = e.let(T.reinterpret("uint32", self.zero_point[n]))
                for h in range(2):
                    c = 2 * a + h
                    total = self.part[j, 0, c]
                    for i in range(1, s.sums):
                        total = total + (self.part[j, i, c] << e.u32(i))
                    self.total[j, 0, c] = total - zero * row_sum[h]

    def _store(self, row: Any, n: Any, value: Any) -> None:
        super()._store(row, n, value - T.reinterpret("uint32", self.offset[n]))
