"""The code of `rowwise.CudaRowwise`: a row in the registers of a block, reductions, rotation, quantizer."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue
from qcompile.codegen.kernels.cuda import emit as e
from qcompile.codegen.kernels.cuda.butterflies_code import Butterflies
from qcompile.codegen.kernels.cuda.cluster_code import Cluster
from qcompile.codegen.kernels.cuda.kronecker_code import KroneckerCode
from qcompile.codegen.kernels.cuda.rotated_code import RotatedRows
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise
from qcompile.codegen.kernels.cuda.scaled_code import MAGIC
from qcompile.targets.cuda import CudaTarget

NEAR = 2.0**-14
"""More than what ``v (1 / s)`` can differ from ``v / s`` where that is below 2^7: four roundings, 2^7 2 2^-23. Not much more:
one element of a warp that is nearer to a tie makes all of it divide."""


def emit(kind: CudaRowwise, name: str, target: CudaTarget) -> Any:
    """The PrimFunc."""
    written = _MixedKernel if kind.mixed else _RotatedKernel if kind.rotation else _PlainKernel
    with e.kernel(name) as builder:
        written(kind, target).emit()
    return builder.get()


class _Kernel(Cluster):
    """Names of one kernel while it is written; ``most`` rows at once, if blocks take several."""

    value: e.Registers
    left: Any = None
    right: Any = None
    gain: Any = None

    def __init__(self, kind: CudaRowwise, target: CudaTarget) -> None:
        self.k, self.dtype = kind, kind.dtype
        self.blocks = kind.shares
        self.most = max(1, kind.resident * target.multiprocessors // self.blocks)
        self.stmatrix = target.has("cluster")

    def emit(self) -> None:
        k = self.k
        m = T.int32()
        self.x = e.argument("x", (m, k.width * (2 if k.gated else 1)), k.dtype)
        self.gamma = e.argument("gamma", (k.width,), "float32") if k.gamma else None
        self.beta = e.argument("beta", (k.width,), "float32") if k.beta else None
        self.factor = e.argument("factor", (k.width,), "float32") if k.factor else None
        if k.mixed:
            self.left = e.argument("left", (k.mixed.matrix_words(0),), "uint32")
            self.right = e.argument("right", (k.mixed.matrix_words(1),), "uint32")
            self.gain = e.argument("gain", (1,), "float32")
        self.static = e.argument("static_scale", (1,), "float32") if k.quantize == "tensor" else None
        self.y = e.argument("y", (m, k.width), k.out) if k.out else None
        self.codes = e.argument("codes", (m, k.width), "int8") if k.quantize else None
        self.scale = e.argument("scale", (m,), "float32") if k.quantize else None
        T.device_entry()
        launched = T.min(m, self.most) if k.transform else m
        self.rank: Any = 0
        if self.blocks > 1:
            self.row, self.rank = T.cta_id([launched, self.blocks])
        else:
            self.row = T.cta_id([launched])
        self.tx = T.thread_id([k.threads])
        self.arena, self.row_at = e.shared(k.shared_bytes), k.row_at
        self.reductions, self.parity, self.phase = 0, 0, 0
        self.constants: dict[Any, e.Registers] = {}
        self._rows(m, launched)

    def _rows(self, m: Any, launched: Any) -> None:
        """Compute the rows of this block."""
        raise NotImplementedError

    def _store_values(self) -> None:
        k = self.k
        if self.y is None:
            return

        def write(c: int, at: Any) -> None:
            self._write(self.y, at, [self.value[c, i] for i in range(k.vector)], k.out)

        if k.mixed and self.blocks > 1:  # each has the whole row
            with T.If(self.rank == 0), T.Then():
                self._each(write)
        else:
            self._each(write)

    def _multiply_factor(self) -> None:
        """Multiply values by the factor of their channel, if there is one."""
        if self.factor is None:
            return

        def multiply(c: int, at: Any) -> None:
            for i, factor in enumerate(self._read(self.factor, [at], "float32")):
                self.value[c, i] = self.value[c, i] * factor

        self._each(multiply)

    # Elements

    def _each(self, use: Any, otherwise: Any = None) -> None:
        """Call ``use(chunk, column)`` for every vector of this thread inside the row."""
        for c in range(self.k.chunks):
            place, conditions = self.k.place(c, self.tx, self.rank)
            at = e.let(place)
            if not conditions:
                use(c, at)
                continue
            with T.If(e.all_of(conditions)):
                with T.Then():
                    use(c, at)
                if otherwise is not None:
                    with T.Else():
                        otherwise(c)

    def _read(self, buffer: Any, index: list[Any], dtype: str) -> list[Any]:
        """A vector as float32."""
        k = self.k
        if k.vector == 1:
            return [T.cast(buffer[tuple(index)], "float32")]
        words = self._read_words(buffer, index, k.vector if dtype == "float32" else k.vector // 2)
        if dtype == "float32":
            return [T.reinterpret("float32", w) for w in words]
        if dtype == "bfloat16":
            halves = [
                (words[i // 2] << e.u32(16)) if i % 2 == 0 else words[i // 2] & e.u32(0xFFFF0000)
                for i in range(k.vector)
            ]
            return [T.reinterpret("float32", h) for h in halves]
        halves = [T.cast(words[i // 2] >> e.u32(16 * (i % 2)), "uint16") for i in range(k.vector)]
        return [T.cast(T.reinterpret("float16", h), "float32") for h in halves]

    def _read_words(self, buffer: Any, index: list[Any], count: int) -> list[Any]:
        """``count`` words from an element on, up to four at a time."""
        words = e.Registers((count,), "uint32")
        size = min(count, 4)
        elements = self.k.vector * size // count
        for part in range(count // size):
            place = buffer.ptr_to([*index[:-1], index[-1] + part * elements])
            e.ptx(f"ld.global.nc{e.words_of(size)}.b32", *[words[part * size + i] for i in range(size)], place)
        return [words[i] for i in range(count)]

    def _write(self, buffer: Any, at: Any, values: list[Any], dtype: str) -> None:
        if self.k.vector == 1:
            B.buffer_store(buffer, T.cast(values[0], dtype), [self.row, at])
            return
        if dtype == "float32":
            words = [T.reinterpret("uint32", v) for v in values]
        else:
            words = [e.pair(values[i], values[i + 1], dtype) for i in range(0, len(values), 2)]
        for start in range(0, len(words), 4):
            part = words[start : start + 4]
            place = buffer.ptr_to([self.row, at + start * len(values) // len(words)])
            e.ptx(f"st.global{e.words_of(len(part))}.b32", place, *part)

    def _load(self) -> None:
        k = self.k
        gate = e.Registers((1,), "float32")
        nothing = Epilogue(activation=k.activation)

        def zero(c: int) -> None:
            for i in range(k.vector):
                self.value[c, i] = T.float32(0)

        def load(c: int, at: Any) -> None:
            values = self._read(self.x, [self.row, at], k.dtype)
            others = self._read(self.x, [self.row, at + k.width], k.dtype) if k.gated else None
            for i, v in enumerate(values):
                gate[0] = v
                if not k.norm:
                    gate[0] = e.activate(gate[0], nothing)
                self.value[c, i] = gate[0] * others[i] if others is not None else gate[0]

        self._each(load, zero)

    def _reduce(self, value: Any, operator: str) -> Any:
        """Over the block, or all blocks of the row; zero must be neutral, and maxima not negative. Every reduction has scratch of
        its own, and those of two rows that follow each other have, so that one barrier is enough."""
        warps = self.k.threads // 32
        value = self._of_warp(operator, value)
        if warps * self.blocks == 1:
            return value  # of the only warp
        place = self.k.scratch_at + self.reductions * self.k.slots
        if self.k.transform:
            place = self.k.scratch_at + (2 * self.reductions + self.parity) * self.k.slots
        index, self.reductions = self.reductions, self.reductions + 1
        index -= self.k.reductions - self.k.common
        alone = self.blocks == 1 or index < 0
        if alone or (self.k.staged and warps > 1):
            with T.If(self.tx % 32 == 0), T.Then():
                B.buffer_store(self.arena, T.reinterpret("uint32", value), [place + self.tx // 32])
            T.evaluate(T.cuda.cta_sync())
            value = self._of_scratch(operator, place, warps)
            if alone:
                return value
            place += warps
        if self.k.staged:
            self._tell(value, index, place + self.rank, self.tx)
            return self._of_scratch(operator, place, self.blocks)
        self._tell(value, index, place + self.rank * warps + self.tx // 32, self.tx % 32)
        return self._of_scratch(operator, place, warps * self.blocks)

    def _of_warp(self, operator: str, value: Any) -> Any:
        if operator == "max":  # of words: NaN counts as largest
            return e.let(T.reinterpret("float32", e.largest_of_warp(T.reinterpret("uint32", value))))
        return e.let(T.cuda.warp_reduce(value, operator))

    def _of_scratch(self, operator: str, place: Any, count: int) -> Any:
        """Over words from ``place`` on."""
        part = e.Registers((1,), "uint32" if operator == "max" else "float32")
        part[0] = e.u32(0) if operator == "max" else T.float32(0)
        lane = self.tx % 32
        for start in range(0, count, 32):

            def add(start: int = start) -> None:
                other = self.arena[place + lane + start]
                part[0] = T.max(part[0], other) if operator == "max" else part[0] + T.reinterpret("float32", other)

            if start + 32 <= count:
                add()
            else:
                with T.If(lane < count - start), T.Then():
                    add()
        if operator == "max":
            return e.let(T.reinterpret("float32", e.largest_of_warp(part[0])))
        return e.let(T.cuda.warp_reduce(part[0], operator))

    def _constants(self, vector: Any, chunk: int, at: Any) -> Any:
        """What this thread needs of gamma or beta, if there is any."""
        if vector is None:
            return None
        kept = self.constants.get(vector)
        return self._read(vector, [at], "float32") if kept is None else e.View(kept, chunk)

    def _load_constants(self) -> None:
        """Before the row may be read."""
        for vector in (self.gamma, self.beta):
            if vector is None:
                continue
            kept = self.constants[vector] = e.Registers((self.k.chunks, self.k.vector), "float32")

            def load(c: int, at: Any, vector: Any = vector, kept: e.Registers = kept) -> None:
                for i, value in enumerate(self._read(vector, [at], "float32")):
                    kept[c, i] = value

            self._each(load)

    def _sum(self, term: Any) -> Any:
        """Of ``term(value)`` over the row."""
        k = self.k
        total = e.Registers((1,), "float32")
        total[0] = T.float32(0)

        def add(c: int, at: Any) -> None:
            for i in range(k.vector):
                total[0] = total[0] + term(self.value[c, i])

        self._each(add)
        return self._reduce(total[0], "sum")

    def _normalise(self) -> None:
        k = self.k
        if not k.norm:
            return
        inverse = T.float32(1.0 / k.width)
        if k.norm == "layer":
            mean = e.let(self._sum(lambda v: v) * inverse)
            for c in range(k.chunks):
                for i in range(k.vector):
                    self.value[c, i] = self.value[c, i] - mean
        factor = e.let(T.float32(1) / T.sqrt(self._sum(lambda v: v * v) * inverse + T.float32(k.epsilon)))

        def scale(c: int, at: Any) -> None:
            gamma, beta = self._constants(self.gamma, c, at), self._constants(self.beta, c, at)
            for i in range(k.vector):
                v = self.value[c, i] * factor
                v = v * gamma[i] if gamma is not None else v
                self.value[c, i] = v + beta[i] if beta is not None else v
                self.value[c, i] = e.activate(self.value[c, i], Epilogue(activation=k.activation))

        self._each(scale)


class _RotatedKernel(_Kernel, RotatedRows):
    """Rows that tensor cores rotate."""

    def _rows(self, m: Any, launched: Any) -> None:
        self._transform_rows(m, launched)


class _MixedKernel(_Kernel, KroneckerCode):
    """Rows that they multiply by a Kronecker product."""

    def _rows(self, m: Any, launched: Any) -> None:
        self._transform_rows(m, launched)


class _PlainKernel(_Kernel, Butterflies):
    """A row per block, quantized as ``QuantizePerToken`` does."""

    def _rows(self, m: Any, launched: Any) -> None:
        k = self.k
        e.share_device()
        if self.blocks > 1:
            self._start_barriers(k.barriers)
            T.evaluate(T.cuda.cta_sync())
            self._expect(e.u32(0), k.common, k.told)
        if k.spread:
            self._load_constants()
        e.await_previous()
        self.value = e.Registers((k.chunks, k.vector), "float32")
        self._load()
        if self.blocks > 1:
            self._await_others()
        self._normalise()
        self._store_values()
        if k.quantize:
            self._multiply_factor()
            if k.hadamard:
                self._rotate()
            self._quantize()

    def _quantize(self) -> None:
        """Codes from products with 1 / step; where one is near a tie, the whole thread divides, as ``QuantizePerToken``
        does, and stores again: the products differ from quotients by less than `NEAR`."""
        k, value = self.k, self.value
        pieces, size = value.shape
        top = (1 << k.bits - 1) - 1
        step, inverse = e.Registers((1,), "float32"), e.Registers((1,), "float32")
        if self.static is not None:
            step[0] = self.static[0]
            low, high, zero = -top - 1 - k.zero_point, top - k.zero_point, k.zero_point
        else:
            low, high, zero = -top, top, 0
            largest = e.Registers((1,), "float32")
            largest[0] = T.float32(0)

            def grow(c: int, at: Any) -> None:
                for i in range(size):
                    largest[0] = T.max(largest[0], T.abs(value[c, i]))

            self._each(grow)
            most = self._reduce(largest[0], "max")
            e.ptx("div.rn.f32", step[0], most * T.float32(k.clip), T.float32(top))
            step[0] = T.Select(step[0] == T.float32(0), T.float32(1), step[0])
        with T.If(self.tx == 0 if self.blocks == 1 else T.And(self.tx == 0, self.rank == 0)), T.Then():
            B.buffer_store(self.scale, step[0], [self.row])
        e.ptx("div.rn.f32", inverse[0], T.float32(1), step[0])
        bounded = self.static is not None or k.clip < 1
        code = e.Registers((pieces, size), "uint32")
        farthest = e.Registers((1,), "float32")
        farthest[0] = T.float32(0)
        rounded, q = e.Registers((1,), "float32"), e.Registers((1,), "float32")

        def bound(number: Any) -> Any:
            return T.max(T.min(number, T.float32(high)), T.float32(low)) if bounded else number

        def multiply(c: int, at: Any) -> None:
            for i in range(size):
                q[0] = bound(value[c, i] * inverse[0])
                rounded[0] = q[0] + T.float32(MAGIC)
                code[c, i] = T.reinterpret("uint32", rounded[0]) + e.u32(zero & 0xFFFFFFFF)
                farthest[0] = T.max(farthest[0], T.abs(q[0] - (rounded[0] - T.float32(MAGIC))))
            self._store_vector(code, c, at)

        def divide(c: int, at: Any) -> None:
            for i in range(size):
                e.ptx("div.rn.f32", q[0], value[c, i], step[0])
                rounded[0] = bound(q[0]) + T.float32(MAGIC)
                code[c, i] = T.reinterpret("uint32", rounded[0]) + e.u32(zero & 0xFFFFFFFF)
            self._store_vector(code, c, at)

        self._each(multiply)
        with T.If(farthest[0] > T.float32(0.5 - NEAR)), T.Then():
            self._each(divide)

    def _store_vector(self, code: e.Registers, c: int, at: Any) -> None:
        """Codes of neighbours, one byte each."""
        if self.k.vector == 1:
            B.buffer_store(self.codes, T.cast(T.cast(code[c, 0], "int32"), "int8"), [self.row, at])
            return
        e.store_bytes(self.codes.ptr_to([self.row, at]), [code[c, i] for i in range(self.k.vector)])
