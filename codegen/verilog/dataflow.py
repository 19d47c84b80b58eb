"""Arithmetic without control: operations on words, the pipeline stage of each, and their Verilog.

Every operation takes a number of *levels*, an adder one, and a register follows after every so many levels. A word that is
used later than it is made is carried along by registers, so when it is made matters. With ``p_i`` the level at which word
``i`` is complete and ``q_i`` the last one at which it is used,

    minimise  sum_i width_i * (q_i - p_i)      given  p_j >= p_i + levels_j,  q_i >= p_j - levels_j  for all i that j uses

is the dual of a network flow problem, whose linear relaxation has integral solutions (Leiserson and Saxe, "Retiming synchronous
circuitry" (1991), section 8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from qcompile.codegen.verilog.adder_graph import AdderGraph, Term
from qcompile.formats.fixed import IntType, shift_half_even

LEVELS = {"input": 0, "constant": 0, "floor": 0, "add": 1, "negate": 1, "round": 1, "clamp": 1}
"""Operations, and the levels they take."""


@dataclass(frozen=True)
class Word:
    """The result of one operation.

    Attributes:
        kind: of `LEVELS`.
        low, high: its exact range.
        operands: words as ``sign * (word << shift)``.
        amount: bits shifted out by ``floor`` and ``round``.
    """

    kind: str
    low: int
    high: int
    operands: tuple[Term, ...] = ()
    amount: int = 0

    @property
    def type(self) -> IntType:
        """The narrowest type of it."""
        return IntType.covering(self.low, self.high)


class Dataflow:
    """Words in order of computation.

    Attributes:
        words: operands come before their users.
        outputs: indices of words.
    """

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.outputs: list[int] = []

    def push(self, word: Word) -> int:
        """Add a word and return its index."""
        self.words.append(word)
        return len(self.words) - 1

    def input(self, low: int, high: int) -> int:
        """A word from outside."""
        return self.push(Word("input", low, high))

    def sums(self, graph: AdderGraph, inputs: list[int]) -> list[Term]:
        """The words of an adder graph; returns the terms of its outputs. A column of zeros is the constant 0."""
        index = dict(enumerate(inputs))
        for i, lives in enumerate(graph.live()):
            value = graph.values[i]
            if i in index or not lives:
                continue
            terms = [Term(index[t.value], t.shift, t.sign) for t in (value.a, value.b) if t is not None]
            kind = {0: "constant", 1: "negate", 2: "add"}[len(terms)]
            index[i] = self.push(Word(kind, value.low, value.high, tuple(terms)))
        return [
            Term(self.push(Word("constant", 0, 0)), 0, 1) if t is None else t._replace(value=index[t.value])
            for t in graph.outputs
        ]

    def shifted(self, term: Term, amount: int, *, exact: bool) -> Term:
        """``term / 2^amount``, rounded half to even, or down where it is known that this is the same (``exact``)."""
        less = min(term.shift, amount)
        term, amount = term._replace(shift=term.shift - less), amount - less
        if not amount:
            return term
        word = self.words[term.value]
        if word.kind == "constant":
            number = word.low >> amount if exact else int(shift_half_even(np.array([word.low]), amount)[0])
            return Term(self.push(Word("constant", number, number)), 0, 1)
        if exact:
            made = Word("floor", word.low >> amount, word.high >> amount, (term,), amount)
        else:
            low, high = (int(v) for v in shift_half_even(np.array([word.low, word.high]), amount))
            made = Word("round", low, high, (term,), amount)
        return Term(self.push(made), 0, 1)

    def clamped(self, term: Term, low: int, high: int) -> int:
        """``min(max(term, low), high)``; the word itself where that changes nothing and it is not shifted."""
        word = self.words[term.value]
        least, most = word.low << term.shift, word.high << term.shift
        if not term.shift and low <= least and most <= high:
            return term.value
        kind = "clamp" if word.kind != "constant" else "constant"
        operands = (term,) if kind == "clamp" else ()
        return self.push(Word(kind, min(max(least, low), high), max(min(most, high), low), operands))

    # Schedule.

    def positions(self) -> np.ndarray:
        """The level at which every word is complete, int64; registers are fewest."""
        words, n = self.words, len(self.words)
        last = self.depth()
        used = np.zeros(2 * n)
        rows: list[tuple[int, int, int]] = []  # x[plus] - x[minus] <= -gap
        for j, word in enumerate(words):
            for term in word.operands:
                rows.append((term.value, j, LEVELS[word.kind]))  # p_i - p_j <= -levels
                rows.append((j, n + term.value, -LEVELS[word.kind]))  # p_j - q_i <= levels
            rows.append((j, n + j, 0))
            if word.kind != "constant":
                used[n + j], used[j] = word.type.bits, -word.type.bits
        low, high = np.zeros(2 * n), np.full(2 * n, float(last))
        for j, word in enumerate(words):
            if word.kind in ("input", "constant"):
                high[j] = 0
        low[[n + j for j in self.outputs]] = last
        count = np.arange(len(rows))
        plus, minus, gap = (np.array(v) for v in zip(*rows))
        matrix = coo_array(
            (np.r_[np.ones(len(rows)), -np.ones(len(rows))], (np.r_[count, count], np.r_[plus, minus])),
            shape=(len(rows), 2 * n),
        )
        found = linprog(
            used, A_ub=matrix.tocsr(), b_ub=-gap.astype(float), bounds=np.stack([low, high], 1), method="highs-ds"
        )
        assert found.x is not None, found.message
        return np.rint(found.x[:n]).astype(np.int64)

    def depth(self) -> int:
        """Levels on the longest path."""
        reach: list[int] = []
        for word in self.words:
            reach.append(max((reach[t.value] for t in word.operands), default=0) + LEVELS[word.kind])
        return max((reach[o] for o in self.outputs), default=0)

    def stages(self, every: int) -> int:
        """Registers on every path, with one after ``every`` levels; at least one."""
        return max(1, -(-self.depth() // every))

    def stage_of(self, every: int) -> tuple[np.ndarray, np.ndarray]:
        """For every word the stage in which it is made, and the last one in which it is used, int64."""
        stage = np.maximum(0, (self.positions() - 1) // every)
        until = stage.copy()  # a word made in stage s is in a register from s + 1 on
        for j, word in enumerate(self.words):
            for term in word.operands:
                until[term.value] = max(until[term.value], stage[j])
        until[self.outputs] = self.stages(every)
        return stage, until

    def area(self, every: int) -> tuple[float, float]:
        """Look-up tables and flip-flops, before synthesis."""
        luts = 0.0
        for word in self.words:
            if word.kind == "add":
                luts += adder_tables(self.words, word)
            elif word.kind == "negate":
                luts += word.type.bits + 1
            elif word.kind in ("round", "clamp"):
                (term,) = word.operands
                luts += word.type.bits + 1 + (self.words[term.value].type.bits + term.shift) / 6
        stage, until = self.stage_of(every)
        bits = np.array([0 if w.kind == "constant" else w.type.bits for w in self.words])
        return luts, float(bits @ (until - stage))

    def verilog(self, every: int, bits: int) -> dict[str, Any]:
        """The statements of a pipeline with registers after ``every`` levels.

        Args:
            every: levels between registers.
            bits: of an output.

        Returns:
            ``inputs`` as (name, bits), ``registers`` as (declaration, name, expression), ``wires`` as (declaration,
            expression), ``adders`` of three as (name, bits, which operands are subtracted, expressions); ``outputs``,
            an expression each, in registers.
        """
        last = self.stages(every)
        stage, until = self.stage_of(every)
        wires, registers, adders = [], [], []

        def name(i: int, at: int) -> str:
            return f"w{i}" if at == stage[i] else f"w{i}_{at}"

        for i, word in enumerate(self.words):
            if word.kind == "constant":
                continue
            width = word.type.bits
            if word.kind != "input":
                writer = _Writer(self.words, {t.value: name(t.value, int(stage[i])) for t in word.operands})
                text = writer.write(word)
                wires += [(f"{left} w{i}{right}".strip(), value.replace("@", f"w{i}")) for left, right, value in text]
                if len(word.operands) == 3:
                    adders.append((f"w{i}_u" if writer.passed(word) else f"w{i}", *writer.three(word)))
            for at in range(int(stage[i]) + 1, int(until[i]) + 1):
                registers.append((f"[{width - 1}:0] {name(i, at)}", name(i, at), name(i, at - 1)))
        inputs = [(f"w{i}", w.type.bits) for i, w in enumerate(self.words) if w.kind == "input"]
        outputs = [_Writer(self.words, {o: name(o, last)}).bits(o, bits) for o in self.outputs]
        return {"wires": wires, "registers": registers, "outputs": outputs, "inputs": inputs, "adders": adders}


def adder_tables(words: list[Word], word: Word) -> int:
    """Look-up tables of a sum: one per bit, sign copies once, none for bits that pass from the first operand."""
    a, b, *_ = word.operands
    top = max(words[t.value].type.bits + t.shift for t in word.operands) + len(word.operands) - 2
    return min(word.type.bits, top) - (b.shift if a.sign > 0 and a.shift == 0 else 0)


def _literal(number: int, bits: int) -> str:
    return f"{bits}'d{number & ((1 << bits) - 1)}"


class _Writer:
    """Expressions of one word, given the names of its operands at the stage where it is computed."""

    def __init__(self, words: list[Word], names: dict[int, str]) -> None:
        self.words, self.names = words, names

    def signed(self, index: int, drop: int = 0) -> str:
        """Operand ``index`` without its lowest bits, as a signed expression."""
        word, name = self.words[index], self.names[index]
        width = word.type.bits
        if word.kind == "constant":
            number = word.low >> drop
            return f"$signed({_literal(number, max(number.bit_length() + 1, 1))})"
        if drop >= width:
            return f"$signed({name}[{width - 1}])" if word.type.signed else "1'sb0"
        part = f"{name}[{width - 1}:{drop}]" if drop else name
        return f"$signed({part})" if word.type.signed else f"$signed({{1'b0, {part}}})"

    def bits(self, index: int, count: int) -> str:
        """The lowest ``count`` bits."""
        word, name = self.words[index], self.names[index]
        width = word.type.bits
        if word.kind == "constant":
            return _literal(word.low, count)
        if count == width:
            return name
        if count < width:
            return f"{name}[{count - 1}:0]"
        fill = f"{name}[{width - 1}]" if word.type.signed else "1'b0"
        return f"{{{{{count - width}{{{fill}}}}}, {name}}}"

    def write(self, word: Word) -> Iterator[tuple[str, str, str]]:
        """Declarations around the name, with expressions: (text before the name, after it, expression)."""
        width = word.type.bits
        if word.kind == "add":
            yield from self._add(word, width)
        elif word.kind == "negate":
            yield f"[{width - 1}:0]", "", f"-{self.signed(word.operands[0].value)}"
        elif word.kind == "floor":
            yield f"signed [{width - 1}:0]", "", self.signed(word.operands[0].value, word.amount)
        elif word.kind == "round":
            yield from self._round(word, width)
        elif word.kind == "clamp":
            yield from self._clamp(word, width)

    def three(self, word: Word) -> tuple[int, str, list[str]]:
        """A sum of three by ``rtl/ternary_adder.v``: its bits, the mask of operands that are subtracted, the operands."""
        passed = self.passed(word)
        width = word.type.bits - passed
        negative = "".join(str(int(t.sign < 0)) for t in reversed(word.operands))
        return width, f"3'b{negative}", [self._aligned(t, passed, width) for t in word.operands]

    def passed(self, word: Word) -> int:
        """Lowest bits of a sum that are those of its first operand."""
        a, b, *_ = word.operands
        return b.shift if a.sign > 0 and not a.shift else 0

    def _aligned(self, term: Term, drop: int, width: int) -> str:
        """``width`` bits of an operand from bit ``drop`` on."""
        shift = max(term.shift - drop, 0)
        drop = max(drop - term.shift, 0)
        word, name = self.words[term.value], self.names[term.value]
        if word.kind == "constant":
            return _literal((word.low >> drop) << shift, width)
        bits = word.type.bits
        kept = max(min(bits - drop, width - shift), 0)
        parts = []
        if (copies := width - shift - kept) > 0:
            top = f"{name}[{bits - 1}]" if word.type.signed else "1'b0"
            parts.append(f"{{{copies}{{{top}}}}}")
        if kept:
            parts.append(name if kept == bits else f"{name}[{drop + kept - 1}:{drop}]")
        if shift:
            parts.append(f"{shift}'b0")
        return "{" + ", ".join(parts) + "}"

    def _add(self, word: Word, width: int) -> Iterator[tuple[str, str, str]]:
        if len(word.operands) == 3:
            passed = self.passed(word)
            if passed:
                yield f"[{width - 1}:0]", "", f"{{@_u, {self.bits(word.operands[0].value, passed)}}}"
            return
        a, b = word.operands
        sign = "+" if b.sign > 0 else "-"
        if a.sign < 0 or a.shift:  # (a << shift) - b: no bit of it is free
            shift = a.shift
            first = f"$signed({{{self.signed(a.value)}, {shift}'b0}})" if shift else self.signed(a.value)
            yield f"signed [{width - 1}:0]", "", f"{first} {sign} {self.signed(b.value)}"
        elif b.shift == 0:
            yield f"signed [{width - 1}:0]", "", f"{self.signed(a.value)} {sign} {self.signed(b.value)}"
        else:
            # The lowest bits are those of a.
            yield (
                f"signed [{width - b.shift - 1}:0]",
                "_u",
                (f"{self.signed(a.value, b.shift)} {sign} {self.signed(b.value)}"),
            )
            yield f"[{width - 1}:0]", "", f"{{@_u, {self.bits(a.value, b.shift)}}}"

    def _round(self, word: Word, width: int) -> Iterator[tuple[str, str, str]]:
        index, s = word.operands[0].value, word.amount
        name, source = self.names[index], self.words[index].type.bits
        if s > source:  # only the sign is left, which rounds to zero
            yield f"[{width - 1}:0]", "", "0"
            return
        below = f"|{name}[{s - 2}:0]" if s > 1 else "1'b0"
        kept = f"{name}[{s}]" if s < source else (f"{name}[{source - 1}]" if self.words[index].type.signed else "1'b0")
        yield "", "_c", f"{name}[{s - 1}] & ({below} | {kept})"
        yield f"signed [{width - 1}:0]", "", f"{self.signed(index, s)} + $signed({{1'b0, @_c}})"

    def _clamp(self, word: Word, width: int) -> Iterator[tuple[str, str, str]]:
        term = word.operands[0]
        source = self.words[term.value]
        kind = IntType.covering(source.low << term.shift, source.high << term.shift)
        name = self.names[term.value]
        if term.shift:
            name = "@_t"
            yield f"[{kind.bits - 1}:0]", "_t", f"{{{self.names[term.value]}, {term.shift}'b0}}"
        top = kind.bits - 1
        negative = f"{name}[{top}]" if kind.signed else "1'b0"
        tests = []
        if source.high << term.shift > word.high:
            tests.append(("@_o", _above(name, negative, top, kind, word.high), word.high))
        if source.low << term.shift < word.low:
            tests.append(("@_n", _below(name, negative, top, kind, word.low), word.low))
        text = f"{name}[{width - 1}:0]" if width <= kind.bits else f"{{1'b0, {name}}}"
        for flag, test, bound in reversed(tests):
            yield "", flag[1:], test
            text = f"{flag} ? {_literal(bound, width)} : {text}"
        yield f"[{width - 1}:0]", "", text


def _above(name: str, negative: str, top: int, kind: IntType, high: int) -> str:
    """Whether a word exceeds ``high``; a bound of all ones needs a look at the upper bits only."""
    h = (high + 1).bit_length() - 1
    if high >= 0 and high + 1 == 1 << h:
        upper = top if not kind.signed else top - 1
        return f"!{negative} && |{name}[{upper}:{h}]"
    extended = f"$signed({name})" if kind.signed else f"$signed({{1'b0, {name}}})"
    return f"{extended} > {high}"


def _below(name: str, negative: str, top: int, kind: IntType, low: int) -> str:
    """Whether a word is below ``low``."""
    h = (-low).bit_length() - 1
    if low == 0:
        return negative
    if low < 0 and -low == 1 << h:
        return f"{negative} && !(&{name}[{top}:{h}])"
    extended = f"$signed({name})" if kind.signed else f"$signed({{1'b0, {name}}})"
    return f"{extended} < {low}"
