"""The few words CUDA kernels are written in: PTX instructions, registers, names. Statements go to the open builder frame."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.base import Epilogue


def ptx(instruction: str, *operands: Any, **guard: Any) -> None:
    """Emit one PTX instruction; destinations first, as in PTX. ``guard``: see `T.ptx` (``pred``, ``preserve_dst``)."""
    T.evaluate(T.ptx[instruction](*operands, **guard))


def let(value: Any) -> Any:
    """Evaluate once, name the result."""
    return B.Bind(value)


def u32(value: int) -> Any:
    """An unsigned immediate."""
    return T.uint32(value)


class Registers:
    """A register array; indices must be Python integers, or the compiler moves it to memory."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.shape = tuple(shape)
        self.buffer = T.alloc_local(self.shape, dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.buffer[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        B.buffer_store(self.buffer, value, list(index) if isinstance(index, tuple) else [index])


class View:
    """The registers whose leading indices are given."""

    def __init__(self, registers: Registers, *prefix: int) -> None:
        self.registers, self.prefix = registers, prefix

    def __getitem__(self, index: int) -> Any:
        return self.registers[(*self.prefix, index)]

    def __setitem__(self, index: int, value: Any) -> None:
        self.registers[(*self.prefix, index)] = value


@contextlib.contextmanager
def kernel(name: str) -> Iterator[IRBuilder]:
    """Open a device PrimFunc called ``name``."""
    with IRBuilder() as builder, B.prim_func():
        B.func_name(name)
        B.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield builder


_overlap: ContextVar[bool] = ContextVar("overlap", default=False)


@contextlib.contextmanager
def overlapping(allowed: bool) -> Iterator[None]:
    """Kernels written meanwhile are launched before those before them in the stream have ended, if ``allowed``."""
    token = _overlap.set(allowed)
    try:
        yield
    finally:
        _overlap.reset(token)


def share_device() -> None:
    """Let the next kernel of the stream start where this one leaves room; it waits in `await_previous`."""
    if _overlap.get():
        ptx("griddepcontrol.launch_dependents")


def await_previous() -> None:
    """Wait until kernels before in the stream have ended: nothing but weights may be read, and nothing written, before."""
    if _overlap.get():
        ptx("griddepcontrol.wait")


def start() -> None:
    """How kernels without weights begin."""
    share_device()
    await_previous()


def argument(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """A buffer parameter."""
    return B.arg(name, B.buffer(tuple(shape), dtype))


def shared(bytes_: int) -> Any:
    """The block's dynamic shared memory as 32-bit words; there is one such arena per kernel."""
    pool = SMEMPool()
    arena = pool.alloc((-(-bytes_ // 4),), "uint32", align=128)
    pool.commit()
    return arena


def spread(count: int, threads: int, thread: Any, use: Callable[[Any], None]) -> None:
    """Call ``use(index)`` for every index below ``count`` in some thread of ``threads``."""
    for turn in range(-(-count // threads)):
        index = let(turn * threads + thread)
        if (turn + 1) * threads <= count:
            use(index)
        else:
            with T.If(index < count), T.Then():
                use(index)


def copy_async(dst: Any, src: Any, size: int, valid: Any = None, **guard: Any) -> None:
    """Copy ``size`` bytes to shared memory in the background: 16 past the first-level cache, fewer through it.

    Args:
        valid: bytes to read (uint32), zeros for the rest; all of them by default.
    """
    tail = [size] if valid is None else [size, valid]
    ptx(f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global", dst, src, *tail, **guard)


def commit() -> None:
    """Close the group of copies issued so far."""
    ptx("cp.async.commit_group")


def wait(pending: int) -> None:
    """Wait until at most ``pending`` groups are under way."""
    ptx("cp.async.wait_group", pending)


def read_shared(registers: Sequence[Any], address: Any) -> None:
    """Load 1, 2 or 4 words."""
    count = len(registers)
    ptx("ld.shared" + (f".v{count}" if count > 1 else "") + ".b32", *registers, address)


def read_matrices(registers: Sequence[Any], address: Any) -> None:
    """Load four 8 x 16-byte matrices; lane l names row l % 8 of matrix l / 8, lane 4 g + t gets word t of row g."""
    ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, address)


def pair(low: Any, high: Any, dtype: str) -> Any:
    """Two float32 rounded to ``dtype`` in one register, ``low`` in the low half."""
    out = Registers((1,), "uint32")
    ptx(f"cvt.rn.{'bf16x2' if dtype == 'bfloat16' else 'f16x2'}.f32", out[0], high, low)
    return out[0]


def all_of(conditions: Sequence[Any]) -> Any:
    """Whether all of one or more conditions hold."""
    first, *rest = conditions
    return T.And(first, all_of(rest)) if rest else first


def largest_of_warp(value: Any) -> Any:
    """The largest word (uint32) of the lanes of a warp."""
    source = """
__forceinline__ __device__ unsigned int largest_of_warp(unsigned int value) { return __reduce_max_sync(0xffffffffu, value); }
"""
    return T.cuda.func_call("largest_of_warp", value, source_code=source, return_type="uint32")


def store_remote(address: Any, word: Any, barrier: Any) -> None:
    """Store a word in another block's shared memory; the mbarrier there counts its four bytes. Addresses are of the cluster."""
    source = """
__forceinline__ __device__ void store_remote(unsigned int address, unsigned int word, unsigned int barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(address), "r"(word), "r"(barrier) : "memory");
}
"""
    T.evaluate(T.cuda.func_call("store_remote", address, word, barrier, source_code=source))


def store_remote_vector(address: Any, words: Sequence[Any], barrier: Any) -> None:
    """The same for four words, 16 bytes."""
    source = """
__forceinline__ __device__ void store_remote_vector(
    unsigned int address, unsigned int a, unsigned int b, unsigned int c, unsigned int d, unsigned int barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier) : "memory");
}
"""
    T.evaluate(T.cuda.func_call("store_remote_vector", address, *words, barrier, source_code=source))


def activate(value: Any, epilogue: Epilogue) -> Any:
    """The activation function on a float32."""
    if epilogue.activation == "relu":
        return T.max(value, T.float32(0))
    if epilogue.activation == "silu":
        return value / (T.float32(1) + T.exp(-value))
    if epilogue.activation == "gelu":
        return T.float32(0.5) * value * (T.float32(1) + T.erf(value * T.float32(0.7071067811865476)))
    if epilogue.activation == "gelu_tanh":
        inner = T.float32(0.7978845608028654) * (value + T.float32(0.044715) * value * value * value)
        return T.float32(0.5) * value * (T.float32(1) + T.tanh(inner))
    return value


def words_of(count: int) -> str:
    """How PTX names so many words of an instruction at once."""
    return f".v{count}" if count > 1 else ""


def store_bytes(place: Any, bytes_: Sequence[Any]) -> None:
    """Write the low bytes of 4 or 8 words one after another."""
    pairs = Registers((len(bytes_) // 2,), "uint32")
    for h in range(len(bytes_) // 2):
        ptx("prmt.b32", pairs[h], bytes_[2 * h], bytes_[2 * h + 1], u32(0x0040))
    count = len(bytes_) // 4
    words = Registers((count,), "uint32")
    for h in range(count):
        ptx("prmt.b32", words[h], pairs[2 * h], pairs[2 * h + 1], u32(0x5410))
    ptx(f"st.global{words_of(count)}.b32", place, *[words[h] for h in range(count)])
