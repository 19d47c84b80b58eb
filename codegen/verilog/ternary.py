"""Adders of three numbers where a look-up table has two outputs: two sums in a row become one.

With six inputs and two outputs a table makes bit ``i`` of the sum and of the carries of ``a + b + c``, and adds the carry of the
bit below as the carry chain needs it, so three numbers take as many tables as two (``rtl/xc7/ternary_adder.v``). A sum
that only one other sum reads may be part of that one. A sum takes in at most one, and none that took in one itself, so the choice
is a matching in a forest, and the heaviest one is found from the leaves up:

    free(v)  = sum of best(u)                                  u: sums that only v reads
    best(v)  = max(free(v), max over u of free(v) + saved(u, v) + free(u) - best(u))
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.verilog.adder_graph import Term
from qcompile.codegen.verilog.dataflow import Dataflow, Word, adder_tables

WAITING = 0.1
"""Cost of a bit in a register, in tables."""


def fuse(flow: Dataflow) -> None:
    """Join sums of two where that saves tables, in place."""
    words = flow.words
    readers: list[list[int]] = [[] for _ in words]
    for j, word in enumerate(words):
        for term in word.operands:
            readers[term.value].append(j)
    kept = set(flow.outputs)

    def inside(i: int, j: int) -> bool:
        return len(readers[i]) == 1 and i not in kept and is_pair(words[i]) and is_pair(words[j])

    free, best = [0.0] * len(words), [0.0] * len(words)
    taken: list[int | None] = [None] * len(words)
    for j, word in enumerate(words):
        own = {t.value for t in word.operands if inside(t.value, j)}
        free[j] = best[j] = sum(best[u] for u in own)
        for u in sorted(own):
            joined = join(words, j, u)
            saved = adder_tables(words, words[u]) + adder_tables(words, word) - adder_tables(words, joined)
            value = free[j] + saved + WAITING * words[u].type.bits + free[u] - best[u]
            if value > best[j]:
                best[j], taken[j] = value, u
    gone: set[int] = set()
    for j in reversed(range(len(words))):  # readers first
        u = taken[j]
        if u is not None and j not in gone:
            words[j] = join(words, j, u)
            gone.add(u)
    _renumber(flow, gone)


def is_pair(word: Word) -> bool:
    """Whether it is a sum of two."""
    return word.kind == "add" and len(word.operands) == 2


def join(words: list[Word], j: int, u: int) -> Word:
    """Sum ``j`` with the operands of sum ``u`` in the place of its term; the least shifted and positive one first."""
    operands = []
    for term in words[j].operands:
        if term.value != u:
            operands.append(term)
            continue
        for part in words[u].operands:
            operands.append(Term(part.value, part.shift + term.shift, part.sign * term.sign))
    return replace(words[j], operands=tuple(sorted(operands, key=lambda t: (t.shift, -t.sign, t.value))))


def _renumber(flow: Dataflow, gone: set[int]) -> None:
    index: dict[int, int] = {}
    words: list[Word] = []
    for i, word in enumerate(flow.words):
        if i not in gone:
            index[i] = len(words)
            words.append(replace(word, operands=tuple(t._replace(value=index[t.value]) for t in word.operands)))
    flow.words, flow.outputs = words, [index[o] for o in flow.outputs]
