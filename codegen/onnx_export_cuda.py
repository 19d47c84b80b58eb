"""How `onnx_export` brings back the weights CUDA kernels read: codes by the bit permutation of their planes, 16-bit scales and
zero points of groups through views of the same bytes, a float32 factor per column.

What comes back is what the kernels multiply with: scales of groups are those rounded to float16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.codegen.kernels.cuda.layout import TILE
from qcompile.codegen.kernels.cuda.linear import LinearShape
from qcompile.codegen.onnx_export import Arrays, Emitter, unpack
from qcompile.codegen.relax.kernels import LinearRecord
from qcompile.formats import IntFormat


@dataclass(frozen=True, eq=False)
class FragmentWeight:
    """Some columns of a packed matrix.

    Attributes:
        shape: of the kernel that reads it.
        names: of the packed arrays, by the packer's own names.
        levels: what codes stand for, float32, where they are no integers.
        start, stop: its columns.
    """

    shape: LinearShape
    names: Mapping[str, str]
    levels: np.ndarray | None
    start: int
    stop: int

    def restore(self, emit: Emitter, node: ir.Node, array: Arrays) -> None:
        """Emit the weight in place of the node that dequantizes it."""
        s = self.shape
        codes = self._part(emit, self._codes(emit, array), s.k)
        unit, zero = 1.0, 0.0
        if self.levels is not None:
            real = emit("Gather", emit.constant(self.levels), emit("Cast", codes, to=int(ir.DataType.INT32)))
        else:
            if s.dual:
                zero = 8.0
            elif s.symmetric:
                # Where x is int8 codes are in two's complement (inverting the sign bit adds its weight) and moved to the
                # top of a byte, which the factors of the columns make up for.
                zero = float(1 << (s.stored_bits if s.integer else s.weight.bits) - 1)
                if s.integer:
                    codes = emit("BitwiseXor", codes, emit.constant(np.array(int(zero), np.uint8)))
                    unit = float(1 << 8 - s.stored_bits)
            real = emit("Cast", codes, to=int(ir.DataType.FLOAT))
        if not s.symmetric:
            real = emit("Sub", real, self._zero(emit, array))
        elif zero:
            real = emit("Sub", real, emit.constant(np.array(zero, np.float32)))
        if s.group:
            kind = ir.DataType.UINT16 if s.dual else ir.DataType.FLOAT16
            real = emit("Mul", real, self._of_groups(emit, array, 0, kind))
        column = self._part(emit, array(self.names["column"]))
        factor = emit("Mul", column, emit.constant(np.array(unit, np.float32)))
        result = emit("Mul", real, factor)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], result)

    def _codes(self, emit: Emitter, array: Arrays) -> ir.Value:
        """Unsigned codes of the padded matrix."""
        s = self.shape
        found = None
        for plane, name in zip(s.layout.planes, ("codes", "high")):
            part = unpack(emit, array(self.names[name]), plane.layout, s.layout.padded(s.k, s.n))
            if found is not None:
                part = emit("BitShift", part, emit.constant(np.array(plane.first, np.uint8)), direction="LEFT")
                part = emit("BitwiseOr", found, part)
            found = part
        assert found is not None
        return found

    def _part(self, emit: Emitter, value: ir.Value, rows: int = 0) -> ir.Value:
        """This weight's columns of a value whose last axis is N, and its first ``rows``."""
        bounds: list[Sequence[int]] = [[self.start], [self.stop], [-1]]
        if rows:
            bounds = [[0, self.start], [rows, self.stop], [0, 1]]
        return emit("Slice", value, *(emit.constant(np.array(b, np.int64)) for b in bounds))

    def _zero(self, emit: Emitter, array: Arrays) -> ir.Value:
        """Zero points ``(K, N)``: float16, or bytes twice where x is int8."""
        s = self.shape
        return self._of_groups(emit, array, int(bool(s.group)), ir.DataType.UINT8 if s.integer else ir.DataType.FLOAT16)

    def _of_groups(self, emit: Emitter, array: Arrays, index: int, kind: ir.DataType) -> ir.Value:
        """A parameter of groups as float32 ``(K, N)``; see `layout.pack_meta` for the order."""
        s = self.shape
        shape: tuple[int, ...] = (s.tiles, s.meta_groups, 8, s.meta_bytes // 4, 2)
        first = emit.constant(np.array(0, np.int64))
        if kind == ir.DataType.UINT8:
            value = emit("Gather", array(self.names["meta"], (kind, (*shape, 2))), first, axis=5)
        else:
            value = array(self.names["meta"], (kind, shape))
        value = emit("Gather", value, emit.constant(np.array(index, np.int64)), axis=3)
        value = emit("Transpose", emit("Cast", value, to=int(ir.DataType.FLOAT)), perm=[1, 0, 3, 2])
        value = emit("Reshape", value, emit.constant(np.array([s.meta_groups, s.tiles * TILE], np.int64)))
        rows = np.minimum(np.arange(s.k, dtype=np.int64) // (s.group or s.k), s.meta_groups - 1)
        return emit("Gather", self._part(emit, value), emit.constant(rows), axis=0)


def places(record: LinearRecord, params: Mapping[str, np.ndarray]) -> dict[str, FragmentWeight]:
    """Where each of the merged weights of a kernel lies, by the name of its codes; empty for bit planes, whose order is not
    spelled out."""
    shape = record.family.shape(record.problem, record.config)  # type: ignore[attr-defined]
    if not isinstance(shape, LinearShape) or not record.packed:
        return {}
    levels = None
    if not isinstance(shape.weight, IntFormat) and not shape.dual:
        if shape.levels:
            planes = params[record.packed["table"]].view(np.uint8).reshape(2, 16)
            halves = planes[0].astype(np.uint16) | planes[1].astype(np.uint16) << 8
            levels = halves.view(np.float16).astype(np.float32)
        else:
            levels = np.nan_to_num(shape.weight.table).astype(np.float32)  # type: ignore[attr-defined]
    found, start = {}, 0
    for name, width in zip(record.weights, record.parts):
        found[name] = FragmentWeight(shape, record.packed, levels, start, start + width)
        start += width
    return found
