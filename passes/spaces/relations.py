"""The constraint system that the rules write and the solver reads.

Unknown: an invertible action on every coordinate of the model. Facts about it:

    same(a, b)        channels a_i and b_i have one basis:            A_a = A_b
    dual(a, b)        a_i and b_i are summed over:                    A_a = A_b^-T
    use(a, ...)       an operator reads or writes ``a`` and restricts its blocks (see `groups.py`)
    product(o, terms) o_i = prod_j t_ji ^ p_j element by element:     log d_o = sum_j p_j log d_tj, one permutation
    scaled(y, x, g)   y_i = g_i x_i with a constant g:                A_y G = G' A_x, solved by a diagonal or by peeling
    link(a, b)        index i of a and of b are permuted together
    unit_link(a, b)   the unit (head, group, expert) of a_i moves together with that of b_i
    pin(a, reason)    only the identity
    alias(node, a)    the operator's own attribute (epsilon) follows the scale of ``a``
    stack(a)          row e of ``a`` are the channels of matrix e; facts about row 0 hold for every row (see `stacks.py`)

Nothing here knows what an operator is: rules translate operators into these facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompile.passes.spaces.groups import FIXED, GL, Limit
from qcompile.passes.spaces.stacks import Stacks


@dataclass(frozen=True)
class Birth:
    """A block of coordinates that came to life together.

    Attributes:
        start: first coordinate.
        count: how many.
        name: the constant or value they are channels of.
        axes: the axes of that constant or value that they run along.
        reader: whether they are the summed axis of a weight, which transforms contragrediently.
        constant: whether ``name`` is a constant.
    """

    start: int
    count: int
    name: str
    axes: tuple[int, ...]
    reader: bool = False
    constant: bool = True


@dataclass(frozen=True)
class Use:
    """One operator's view of some coordinates.

    Attributes:
        node: name of the node, for messages.
        op: its operator type.
        role: what the coordinates are to it ("input", "output", "key" ...).
        coordinates: flat int64.
        limit: restriction on each block.
        mix: equal entries may be mixed with each other.
        unit: equal entries form a unit that permutations map to another unit as a whole.
        color: entries of different color are not interchangeable.
        reason: why the coordinates are restricted, if worth telling.
    """

    node: str
    op: str
    role: str
    coordinates: np.ndarray
    limit: Limit
    mix: np.ndarray | None = None
    unit: np.ndarray | None = None
    color: np.ndarray | None = None
    reason: str = ""


@dataclass(frozen=True)
class Product:
    """``out_i = prod_j terms[j]_i ** power_j``; ``parity[j]`` is 1 if the sign of term j reaches the output."""

    node: str
    out: np.ndarray
    terms: tuple[np.ndarray, ...]
    powers: tuple[float, ...]
    parity: tuple[int, ...]


@dataclass(frozen=True)
class Scaled:
    """``y_i = gamma_i x_i``, with ``x`` divided by its quadratic mean first if ``normalised``.

    ``gamma`` is None if the operator has no such parameter. All arrays are flat and aligned.
    """

    node: str
    y: np.ndarray
    x: np.ndarray
    gamma: np.ndarray | None
    normalised: bool


@dataclass(frozen=True)
class Alias:
    """The attribute or scalar input ``epsilon`` of a node, which scales with the square of its channels."""

    node: str
    coordinates: np.ndarray


@dataclass
class Constraints:
    """All facts about one model. Coordinates are the integers ``0 .. count - 1``."""

    copies: dict[str, str] = field(default_factory=dict)
    """Constants that are copies of another: copy -> original."""
    count: int = 0
    births: list[Birth] = field(default_factory=list)
    edges: list[tuple[np.ndarray, np.ndarray, bool]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    scalings: list[Scaled] = field(default_factory=list)
    links: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    unit_links: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    stacks: Stacks = field(default_factory=Stacks)

    def fresh(
        self, count: int, name: str, axes: Sequence[int], *, reader: bool = False, constant: bool = True
    ) -> np.ndarray:
        """Return ``count`` new coordinates."""
        self.births.append(Birth(self.count, count, name, tuple(axes), reader, constant))
        new = np.arange(self.count, self.count + count)
        self.count += count
        return new

    def fresh_like(self, coordinates: np.ndarray, name: str, axes: Sequence[int]) -> np.ndarray:
        """New coordinates of a value, one for each of ``coordinates``; they stand for as many matrices as those do."""
        height = max(self.stacks.heights(coordinates.reshape(-1)), default=1)
        table = self.fresh(height * coordinates.size, name, axes, constant=False).reshape(height, -1)
        self.stacks.add(table)
        return table[0].reshape(coordinates.shape)

    def tie(self, coordinates: np.ndarray) -> None:
        """All matrices of a stack share the basis of ``coordinates``."""
        for pair in self.stacks.tie(coordinates.reshape(-1)):
            self.edges.append((*pair, False))

    def _each(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same channels of every matrix that the coordinates stand for, flat."""
        flat = tuple(a.reshape(-1) for a in arrays)
        if len(self.stacks.heights(*flat)) > 1:
            for array in flat:
                self.tie(array)
        return self.stacks.each(*flat)

    def identity_of(self, coordinates: np.ndarray | None) -> tuple:
        """What a vector constant is: copies of one constant (see `prepare`) have equal identities."""
        if coordinates is None:
            return ()
        starts = [b.start for b in self.births]
        birth = self.births[int(np.searchsorted(starts, coordinates[0], side="right")) - 1]
        return self.copies.get(birth.name, birth.name), (coordinates - birth.start).tobytes()

    def same(self, a: np.ndarray, b: np.ndarray) -> None:
        """Channels ``a`` and ``b`` (broadcast against each other) have one basis."""
        self._edge(a, b, False)

    def dual(self, a: np.ndarray, b: np.ndarray) -> None:
        """Channels ``a`` are summed over together with ``b``."""
        self._edge(a, b, True)

    def _edge(self, a: np.ndarray, b: np.ndarray, dual: bool) -> None:
        if dual or a is not b:
            self.edges.append((*self._pair(a, b), dual))

    def use(
        self,
        node: str,
        op: str,
        role: str,
        coordinates: np.ndarray,
        limit: Limit = GL,
        *,
        mix: np.ndarray | None = None,
        unit: np.ndarray | None = None,
        color: np.ndarray | None = None,
        single: bool = False,
        reason: str = "",
    ) -> None:
        """Record how an operator sees ``coordinates``; keys are broadcast to their shape. ``single`` forbids mixing."""
        if single:
            mix = np.arange(coordinates.size).reshape(coordinates.shape)
        (flat,) = self._each(coordinates)
        copies = len(flat) // max(1, coordinates.size)
        if mix is None and copies > 1:
            mix = np.zeros_like(coordinates)

        def keys(given: np.ndarray | None) -> np.ndarray | None:
            if given is None:
                return None
            one = np.broadcast_to(given, coordinates.shape).reshape(-1)
            # Channels of different matrices neither mix nor trade places.
            return one if copies < 2 else (one + np.arange(copies)[:, None] * (int(one.max()) + 1)).reshape(-1)

        self.uses.append(Use(node, op, role, flat, limit, keys(mix), keys(unit), keys(color), reason=reason))

    def pin(self, node: str, op: str, role: str, coordinates: np.ndarray, reason: str) -> None:
        """Only the identity may act on ``coordinates``."""
        index = np.arange(coordinates.size)
        self.use(node, op, role, coordinates.reshape(-1), FIXED, mix=index, color=index, reason=reason)

    def product(
        self,
        node: str,
        out: np.ndarray,
        terms: Sequence[np.ndarray],
        powers: Sequence[float],
        parity: Sequence[int] | None = None,
    ) -> None:
        """``out = prod terms ** powers``, index by index."""
        out, *flat = self._each(out, *(np.broadcast_to(t, out.shape) for t in terms))
        signs = tuple(int(p) % 2 for p in powers) if parity is None else tuple(parity)
        self.products.append(Product(node, out, tuple(flat), tuple(powers), signs))

    def scaled(
        self, node: str, y: np.ndarray, x: np.ndarray, gamma: np.ndarray | None, *, normalised: bool = False
    ) -> None:
        """``y = gamma * x`` with a constant gamma (broadcast)."""
        out, *flat = self._each(y, *(np.broadcast_to(t, y.shape) for t in (x, gamma) if t is not None))
        self.scalings.append(Scaled(node, out, flat[0], None if gamma is None else flat[1], normalised))

    def link(self, a: np.ndarray, b: np.ndarray) -> None:
        """Permute ``a`` and ``b`` together."""
        self.links.append(self._pair(a, b))

    def unit_link(self, a: np.ndarray, b: np.ndarray) -> None:
        """Permute the units of ``a`` and ``b`` together."""
        self.unit_links.append(self._pair(a, b))

    def _pair(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one, other = self._each(*np.broadcast_arrays(a, b))
        return one, other
