"""Reading rows of activations next to the rows of a panel: 16 bytes at a time, and less where a row ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from qcompile.codegen.kernels.arm.products import BYTES, Word, signed
from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Emission, position


def over_rows(
    e: Emission,
    first: Any,
    rows: int,
    group: Any,
    body: Callable[[Any, int, Callable[[int, int], Word]], None],
    flush: Callable[[], None],
    every: int,
) -> None:
    """Emit ``body(line, count, activations)`` over the panel rows of a group.

    ``line`` is the first of ``count`` panel rows; ``activations(r, i)`` are consecutive activations of row ``first + r``,
    as many as a lane of weights has (``depth``), from ``depth * i`` after the first k of ``line`` on. Rows go in chunks of
    16 activations or more; where a row of activations ends earlier, one by one with its last activations read again (see
    `Panels`). ``flush()`` is emitted after every ``every`` chunks, and after the last.
    """
    p = e.panels
    chunk = max(1, BYTES // p.step)
    loads = max(1, p.step // BYTES)
    words = BYTES // p.depth
    whole = chunk * p.step
    full = p.group // whole  # of a group that is not the last
    last = (p.k - (p.groups - 1) * p.group) // whole
    chunks = v.let(T.min(T.truncdiv(p.k - group * p.group, whole), full)) if last < full else full
    base = v.let(group * p.rows_per_group)

    def one(i: Any) -> None:
        k = v.let(group * p.group + i * whole)
        wide = [[load_words(e, first + r, k + at * BYTES, words) for at in range(loads)] for r in range(rows)]

        def indexed(r: int, at: int) -> Word:
            return Word(wide[r][at // words], words, at % words, p.depth)

        body(base + i * chunk, chunk, indexed)

    def run(begin: Any, count: Any, together: int = 1) -> None:
        with T.serial(_kept(e, count // together) if isinstance(count, int) else count) as j:
            for i in range(together):
                one(begin + j * together + i)

    if full and (not every or full <= every):
        # One row leaves registers for two chunks at a time, which halves the cost of the loop.
        run(0, chunks, 2 if rows == 1 and isinstance(chunks, int) and chunks % 2 == 0 else 1)
        flush()
    elif full:
        with T.serial(T.truncdiv(chunks + (every - 1), every)) as block:
            run(block * every, v.let(T.min(chunks - block * every, every)))
            flush()
    if last < full or p.rows_per_group > full * chunk:
        with T.serial(p.rows_per_group - chunks * chunk) as i:
            row = v.let(chunks * chunk + i)

            def single(r: int, at: int) -> Word:
                return Word(_last(e, first + r, position(e, group, row, at)), 1, 0, p.depth)

            body(base + row, 1, single)
            flush()


def _kept(e: Emission, count: int) -> Any:
    """``count`` as a bound that LLVM takes for an open one; it would unroll the loop beyond the registers it has."""
    return T.max(count, e.m - (1 << 30)) if count > 4 else count


def load_words(e: Emission, row: Any, k: Any, words: int) -> Any:
    """``words * depth`` consecutive activations, as integers of ``depth`` bytes."""
    depth = e.panels.depth
    return v.let(v.bits_of(signed(v.load(e.names["x"], [row, k], words * depth)), f"int{8 * depth}", words))


def _last(e: Emission, row: Any, k: Any) -> Any:
    """``depth`` consecutive activations, or all there are, as one integer."""
    depth, width = e.panels.depth, e.problem.k
    if width >= depth:
        return load_words(e, row, k, 1)
    kind = f"int{8 * depth}"
    word = tirx.const(0, kind)
    for i in range(width):
        code = T.bitwise_xor(e.names["x"][row, i], T.uint8(128))
        byte = T.shift_left(T.cast(code, kind), tirx.const(8 * i, kind))
        word = T.bitwise_or(word, byte)
    return v.let(word)
