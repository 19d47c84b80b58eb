"""Products with a constant matrix as a graph of additions: ``y = x @ W`` without a multiplier.

Every weight is written in signed digits, a shortest sum of signed powers of two (Reitwiesner, "Binary Arithmetic" (1960)): the
canonical one, or the one with as few changes of sign as possible (3 as 4 - 1 or as 2 + 1), whichever graph has fewer bits. An
output is then a sum of terms ``+-(x_k << s)``, and two outputs that both contain ``x_i +- (x_j << d)``, however
shifted or negated, may share it. The pair that saves most is computed once and replaces its occurrences, until no
pair occurs twice (Hosangadi, Fallah and Kastner, "Optimizing polynomial expressions by algebraic factorization and common
subexpression elimination" (2006), with pairs weighted by the width of their adders as by Sun et al., "da4ml: Distributed
arithmetic for real-time neural networks on FPGAs" (2025)). What remains of each output is summed by a tree that adds narrow numbers first.

    saved by a pair that occurs n times  ~  (n - 1) * (overlap of its operands in bits + width of its adder) / 2

Levels are bounded without search: terms at levels ``l_i`` can be summed within ``L`` levels if and only if
``sum_i 2^l_i <= 2^L`` (Kraft's inequality), so a pair is taken only where the sum stays within the bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qcompile.errors import TargetError
from qcompile.formats.fixed import IntType

WAITING = 0.3
"""Cost of a bit that waits a level in a register, in bits of an adder."""


class Term(NamedTuple):
    """``sign * (value << shift)``."""

    value: int
    shift: int
    sign: int


@dataclass(frozen=True)
class Value:
    """A number in the graph.

    Attributes:
        low, high: its exact range.
        level: adders on the longest path to it.
        a, b: operands, ``a + b`` with one shift 0; `b` is None for a negation, both are for an input or a constant.
    """

    low: int
    high: int
    level: int = 0
    a: Term | None = None
    b: Term | None = None

    @property
    def type(self) -> IntType:
        """The narrowest type of it."""
        return IntType.covering(self.low, self.high)

    @property
    def width(self) -> int:
        """Bits of the type."""
        return self.type.bits


class AdderGraph:
    """Values, inputs first, then constants and sums of two earlier values.

    Attributes:
        values: in order of computation.
        outputs: a term for every column, or None where a column is zero.
        inputs: how many values are inputs.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self._low, self._high = low, high
        self.inputs = len(low)
        self.values = [Value(int(a), int(b)) for a, b in zip(low, high)]
        self.outputs: list[Term | None] = []
        # Every value as a sum of inputs, and a constant.
        self._rows = [np.append(row, 0) for row in np.eye(self.inputs, dtype=np.int64)]

    def constant(self, number: int) -> Term:
        """A constant, not zero."""
        shift = (number & -number).bit_length() - 1
        self.values.append(Value(number >> shift, number >> shift))
        self._rows.append(np.append(np.zeros(self.inputs, np.int64), number >> shift))
        return Term(len(self.values) - 1, shift, 1)

    def row(self, term: Term) -> tuple[np.ndarray, int]:
        """A term as a sum of inputs and a constant: int64 ``(inputs,)``, and a number."""
        row = term.sign * (self._rows[term.value] << term.shift)
        return row[:-1], int(row[-1])

    def add(self, a: Term, b: Term) -> Term:
        """The value ``a + b``, up to sign and shift, and the term that is that sum.

        The operand that is shifted less comes first and positive, so that its low bits pass without an adder.
        """
        if a.shift > b.shift:
            a, b = b, a
        shift, sign = a.shift, a.sign
        return self._append(Term(a.value, 0, 1), Term(b.value, b.shift - shift, b.sign * sign), shift, sign)

    def total(self, terms: list[Term], levels: int) -> Term | None:
        """The sum of some terms, positive: those with the narrowest adders first, as far as levels allow; None of no terms."""
        if not terms:
            return None
        terms = list(terms)

        def top(t: Term) -> int:
            return self.values[t.value].width + t.shift

        while len(terms) > 1:
            terms.sort(key=lambda t: (top(t), t))
            positive = sum(t.sign > 0 for t in terms)
            room = (1 << levels) - sum(1 << self.values[t.value].level for t in terms)
            best: tuple[float, Term, Term] | None = None
            for i, t in enumerate(terms[:12]):
                for u in terms[i + 1 : i + 12]:
                    x, y = self.values[t.value].level, self.values[u.value].level
                    if (2 << max(x, y)) - (1 << x) - (1 << y) > room:
                        continue
                    cost = 1.5 * max(top(t), top(u)) - max(t.shift, u.shift)
                    cost += WAITING * abs(x - y) * self.values[t.value if x < y else u.value].width
                    if positive == 1 and t.sign != u.sign and min(t, u, key=lambda v: v.shift).sign < 0:
                        cost += 1000  # the sum would become negative, and nothing is left to make it positive again
                    if best is None or cost < best[0]:
                        best = (cost, t, u)
            if best is None:  # the two of lowest level always leave what is possible possible
                terms.sort(key=lambda t: (self.values[t.value].level, top(t), t))
                best = (0.0, terms[0], terms[1])
            _, t, u = best
            terms.remove(t)
            terms.remove(u)
            terms.append(self.add(t, u))
        return self.positive(terms[0])

    def positive(self, term: Term) -> Term:
        """A term of sign +1 equal to ``term``; a further adder only where ``term`` is a sum of negative terms alone."""
        if term.sign > 0:
            return term
        opposite = self._opposite(term.value)
        if opposite is None:
            return self._append(Term(term.value, 0, -1), None, term.shift, 1)
        return opposite._replace(shift=term.shift)

    def _opposite(self, index: int) -> Term | None:
        """``-value``: the nearest difference among its operands taken the other way round; None if it is sums only."""
        a, b = self.values[index].a, self.values[index].b
        if a is None or b is None:
            return None
        if b.sign < 0:
            return self._append(b._replace(sign=1), a._replace(sign=-1), 0, 1)
        for one, other in ((a, b), (b, a)):
            opposite = self._opposite(one.value)
            if opposite is not None:
                return self._append(opposite._replace(shift=one.shift), other._replace(sign=-1), 0, 1)
        return None

    def _append(self, a: Term, b: Term | None, shift: int, sign: int) -> Term:
        row = a.sign * (self._rows[a.value] << a.shift)
        level = self.values[a.value].level
        if b is not None:
            row = row + b.sign * (self._rows[b.value] << b.shift)
            level = max(level, self.values[b.value].level)
        up, down, offset = np.maximum(row[:-1], 0), np.minimum(row[:-1], 0), int(row[-1])
        low, high = int(self._low @ up + self._high @ down), int(self._high @ up + self._low @ down)
        self.values.append(Value(low + offset, high + offset, level + 1, a, b))
        self._rows.append(row)
        return Term(len(self.values) - 1, shift, sign)

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """What the graph computes, ``x @ weight + bias``: int64 ``(inputs, outputs)`` and ``(outputs,)``."""
        rows = [(np.zeros(self.inputs, np.int64), 0) if t is None else self.row(t) for t in self.outputs]
        return np.stack([row for row, _ in rows], axis=1), np.array([constant for _, constant in rows])

    @property
    def adders(self) -> int:
        """How many additions."""
        return sum(lives and v.a is not None for v, lives in zip(self.values, self.live()))

    @property
    def levels(self) -> int:
        """Adders on the longest path."""
        return max((v.level for v in self.values), default=0)

    @property
    def bits(self) -> int:
        """Adder bits, about the look-up tables it takes: an adder needs none below the operand that is shifted."""
        return sum(adder_bits(self.values, v) for v, lives in zip(self.values, self.live()) if lives and v.a)

    def live(self) -> list[bool]:
        """Which values an output needs."""
        needed = [False] * len(self.values)
        for term in self.outputs:
            if term is not None:
                needed[term.value] = True
        for i in reversed(range(self.inputs, len(self.values))):
            if needed[i]:
                for operand in (self.values[i].a, self.values[i].b):
                    if operand is not None:
                        needed[operand.value] = True
        return needed


def adder_bits(values: list[Value], value: Value) -> int:
    """Look-up tables of one adder: bits where both operands have digits, once for all copies of a sign."""
    a, b = value.a, value.b
    assert a is not None
    if b is None:
        return value.width
    top = max(values[a.value].width + a.shift, values[b.value].width + b.shift)
    return min(value.width, top) - (b.shift if a.sign > 0 and a.shift == 0 else 0)


def signed_digits(number: int) -> Iterator[tuple[int, int]]:
    """Canonical signed digits, from the lowest: (place, +1 or -1), no two at neighbouring places."""
    place = 0
    while number:
        if number & 1:
            digit = 2 - (number & 3)
            yield place, digit
            number -= digit
        number >>= 1
        place += 1


def alike_digits(number: int) -> Iterator[tuple[int, int]]:
    """As many signed digits, with ``4 - 1`` written ``2 + 1`` at every place: their differences would need all bits."""
    digits = dict(signed_digits(number))
    for place in sorted(digits):
        if place in digits and digits.get(place + 2) == -digits[place]:
            sign = digits.pop(place + 2)
            digits[place] = digits[place + 1] = sign
    yield from sorted(digits.items())


Digits = Callable[[int], Iterable[tuple[int, int]]]
"""A way to write numbers in signed digits."""

Pattern = tuple[int, int, int, int]
"""``x_a + sign * (x_b << shift)`` as (a, b, shift, sign), a <= b; the shift may be negative where a < b."""


def _pattern(t: Term, u: Term) -> Pattern:
    if (t.value, t.shift) > (u.value, u.shift):
        t, u = u, t
    return t.value, u.value, u.shift - t.shift, t.sign * u.sign


class _Elimination:
    """Outputs as sets of terms, and how often every pair of terms occurs."""

    def __init__(self, graph: AdderGraph, weight: np.ndarray, levels: int, digits: Digits) -> None:
        self.graph, self.levels = graph, levels
        self.terms: list[set[Term]] = [set() for _ in range(weight.shape[1])]
        self.places: list[dict[int, set[Term]]] = [{} for _ in range(weight.shape[1])]  # terms by value
        self.kraft = [0] * weight.shape[1]
        self.count: dict[Pattern, int] = {}
        self.heap: list[tuple[float, Pattern, int]] = []
        self.gain: dict[Pattern, float] = {}
        for n, column in enumerate(weight.T.tolist()):
            for k, number in enumerate(column):
                for place, sign in digits(number):
                    self.insert(n, Term(k, place, sign))

    def gain_of(self, pattern: Pattern) -> float:
        """What one avoided adder of a pair saves."""
        found = self.gain.get(pattern)
        if found is None:
            a, b, shift, _ = pattern
            values = self.graph.values
            first, second = values[a].width + max(0, -shift), values[b].width + max(0, shift)
            free = abs(shift)
            overlap, span = min(first, second) - free, max(first, second) - free
            found = self.gain[pattern] = max((overlap + span) / 2, 0.1)
        return found

    def push(self, pattern: Pattern, count: int) -> None:
        heapq.heappush(self.heap, (-(count - 1) * self.gain_of(pattern), pattern, count))

    def insert(self, n: int, term: Term) -> None:
        for other in self.terms[n]:
            pattern = _pattern(term, other)
            count = self.count[pattern] = self.count.get(pattern, 0) + 1
            if count >= 2:
                self.push(pattern, count)
        self.terms[n].add(term)
        self.places[n].setdefault(term.value, set()).add(term)
        self.kraft[n] += 1 << self.graph.values[term.value].level

    def remove(self, n: int, term: Term) -> None:
        self.terms[n].remove(term)
        self.places[n][term.value].remove(term)
        self.kraft[n] -= 1 << self.graph.values[term.value].level
        for other in self.terms[n]:
            self.count[_pattern(term, other)] -= 1

    def run(self) -> None:
        """Share pairs, the best first, until none is left that may be shared."""
        while self.heap:
            _, pattern, count = heapq.heappop(self.heap)
            now = self.count[pattern]
            if now == count:
                self.share(pattern)
            elif 2 <= now < count:  # it became rarer since it was put here
                self.push(pattern, now)

    def share(self, pattern: Pattern) -> None:
        """Compute a pair once, where it occurs and levels allow."""
        a, b, shift, sign = pattern
        values = self.graph.values
        level = max(values[a].level, values[b].level) + 1
        more = (1 << level) - (1 << values[a].level) - (1 << values[b].level)
        found: list[tuple[int, Term, Term]] = []
        for n, places in enumerate(self.places):
            if not places.get(a) or not places.get(b):
                continue
            used: set[Term] = set()
            room = (1 << self.levels) - self.kraft[n]
            for t in sorted(places[a]):
                u = Term(b, t.shift + shift, t.sign * sign)
                if u in places[b] and u != t and t not in used and u not in used and room >= more:
                    used |= {t, u}
                    room -= more
                    found.append((n, t, u))
        if len(found) < 2:
            self.count[pattern] = -(1 << 30)  # too deep everywhere, or it overlaps itself: never again
            return
        first = found[0]
        made = self.graph.add(first[1], first[2])
        for n, t, u in found:
            self.remove(n, t)
            self.remove(n, u)
        for n, t, u in found:
            relative = made.sign * t.sign * first[1].sign
            self.insert(n, Term(made.value, min(t.shift, u.shift), relative))


def constant_matrix(
    weight: np.ndarray, bias: np.ndarray, low: np.ndarray, high: np.ndarray, levels: int | None = None
) -> AdderGraph:
    """The adder graph of ``x @ weight + bias``.

    Args:
        weight: int64 ``(K, N)``.
        bias: int64 ``(N,)``.
        low, high: int64 ``(K,)``, range of the inputs.
        levels: adders on a path, at most; by default one more than the fewest possible, which leaves more to share. A
            column without a positive digit may take one more.

    Raises:
        TargetError: fewer levels than the sums need; says how many they do.
    """
    digits = np.array([[sum(1 for _ in signed_digits(v)) for v in row] for row in weight.tolist()]).sum(0) + (bias != 0)
    least = max(int(digits.max()) - 1, 0).bit_length()
    if levels is not None and levels < least:
        raise TargetError(f"sums of {int(digits.max())} terms need {least} levels of adders, not {levels}")
    levels = least + 1 if levels is None else levels
    graphs = [_shared(weight, bias, low, high, levels, digits) for digits in (signed_digits, alike_digits)]
    return min(graphs, key=lambda graph: graph.bits)


def _shared(
    weight: np.ndarray, bias: np.ndarray, low: np.ndarray, high: np.ndarray, levels: int, digits: Digits
) -> AdderGraph:
    graph = AdderGraph(low, high)
    work = _Elimination(graph, weight, levels, digits)
    for n in np.flatnonzero(bias):
        work.insert(int(n), graph.constant(int(bias[n])))
    work.run()
    graph.outputs = [graph.total(sorted(terms), work.levels) for terms in work.terms]
    return graph
