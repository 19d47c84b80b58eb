"""Sets of axes, known at conversion or only when the program runs.

An operator may take its axes from a tensor computed at run time; their number is then still known (from that tensor's
shape), so the rank of the result is. Whether dimension ``d`` is among them is a condition on dimensions of the running
program, and shapes and loop extents select on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context
from qcompile.codegen.relax.dims import Dim, as_expr
from qcompile.codegen.relax.ops._loops import check, load, loop, loops, scalar, store, when


class Axes:
    """Some of the axes of a tensor.

    Attributes:
        flags: for every dimension whether it is in the set: a bool, or a condition decided when the program runs.
        count: how many axes the set has.
    """

    def __init__(self, ctx: Context, flags: Sequence[Any], count: int, tensor: relax.Expr | None = None) -> None:
        self.ctx = ctx
        self.flags = list(flags)
        self.count = count
        self._tensor = tensor

    @property
    def static(self) -> bool:
        """Whether the set is known at conversion."""
        return all(isinstance(f, bool) for f in self.flags)

    @property
    def indices(self) -> list[int]:
        """The axes, where the set is known."""
        return [i for i, f in enumerate(self.flags) if f]

    @staticmethod
    def of(ctx: Context, rank: int, axes: Sequence[Dim]) -> Axes:
        """The set of the given axes, negative ones counted from the end."""
        if all(isinstance(a, int) for a in axes):
            chosen = {a % rank for a in axes} if rank else set()
            return Axes(ctx, [i in chosen for i in range(rank)], len(chosen))
        given = ctx.materialize(np.array([*axes], dtype=object), "int64")

        def mark(wanted: Any, flags: Any) -> None:
            with loop(0, rank) as d:
                store(flags, [d], as_expr(0))
            with loop(0, len(axes)) as j:
                axis = load(wanted, [j])
                axis = tirx.Select(axis < as_expr(0), axis + as_expr(rank), axis)
                inside = tirx.And(axis >= as_expr(0), axis < as_expr(rank))
                check(inside, f"an axis is outside of the {rank} dimensions")
                check(tirx.EQ(load(flags, [axis]), as_expr(0)), "an axis is given twice")
                store(flags, [axis], as_expr(1))

        flags = loops(ctx, mark, [given], [([rank], "int64")], name="mark_axes")[0]
        return Axes(ctx, [tirx.EQ(f, as_expr(1)) for f in ctx.dims_from_tensor(flags, "axis")], len(axes), flags)

    @staticmethod
    def of_node(ctx: Context, node: ir.Node, rank: int, position: int = 1, name: str = "axes") -> Axes | None:
        """The axes given by an input, or before opset 13 or 18 an attribute; ``None`` where there are none."""
        if len(node.inputs) > position and node.inputs[position] is not None:
            return Axes.of(ctx, rank, ctx.symbolic_or_dynamic(node.inputs[position]))
        axes = attr(node, name, None)
        return None if axes is None else Axes.of(ctx, rank, list(axes))

    # -- shapes -------------------------------------------------------------------------------------------------

    def _select(self, flag: Any, a: Dim, b: Dim) -> Dim:
        if isinstance(flag, bool):
            return a if flag else b
        return tirx.Select(flag, as_expr(a), as_expr(b))

    def ones(self, shape: Sequence[Dim]) -> list[Dim]:
        """The shape with 1 at the axes."""
        result = [self._select(f, 1, d) for f, d in zip(self.flags, shape)]
        return [self.ctx.new_dim(d, "kept") for d in result]

    def removed(self, shape: Sequence[Dim]) -> list[Dim]:
        """The shape without the axes."""
        if self.static:
            return [d for f, d in zip(self.flags, shape) if not f]
        return self._moved(shape, len(shape) - self.count, inserting=False)

    def inserted(self, shape: Sequence[Dim]) -> list[Dim]:
        """The shape with dimensions of 1 put in so that they are at the axes; ``flags`` cover the longer shape."""
        if self.static:
            rest = iter(shape)
            return [1 if f else next(rest) for f in self.flags]
        return self._moved(shape, len(self.flags), inserting=True)

    def _moved(self, shape: Sequence[Dim], rank: int, *, inserting: bool) -> list[Dim]:
        """Computes the shape without the axes, or with ones at them, when the program runs."""
        old = self.ctx.materialize(np.array([*shape], dtype=object), "int64")

        def body(sizes: Any, flags: Any, out: Any) -> None:
            place = scalar("int64")
            store(place, [0], as_expr(0))
            with loop(0, len(self.flags)) as d:
                if inserting:
                    store(out, [d], as_expr(1))
                with when(tirx.EQ(load(flags, [d]), as_expr(0))):
                    if inserting:
                        store(out, [d], load(sizes, [load(place, [0])]))
                    else:
                        store(out, [load(place, [0])], load(sizes, [d]))
                    store(place, [0], load(place, [0]) + 1)

        made = loops(self.ctx, body, [old, self._tensor], [([rank], "int64")], name="move_axes")[0]
        return self.ctx.dims_from_tensor(made, "moved")

    def size(self, shape: Sequence[Dim]) -> Dim:
        """The number of elements along the axes."""
        if self.static:
            return self.ctx.dims.product([d for f, d in zip(self.flags, shape) if f])
        return self.ctx.dims.product([self._select(f, d, 1) for f, d in zip(self.flags, shape)])

    # -- kernels ------------------------------------------------------------------------------------------------

    def zeroed(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """The position with 0 at the axes: where a reduced tensor holds what belongs to it."""
        return tuple(
            self._select(f, 0, i) if not isinstance(f, bool) else as_expr(0) if f else i
            for f, i in zip(self.flags, index)
        )

    def reduce(
        self,
        t: te.Tensor,
        shape: Sequence[Dim],
        reducer: Any,
        *,
        before: Callable[[Any], Any] = lambda v: v,
        value: Callable[..., Any] | None = None,
        name: str = "reduce",
    ) -> te.Tensor:
        """``reducer`` over the axes of ``before(t)``, or of ``value(*index)``; the axes stay with size 1.

        Args:
            t: the tensor, which gives the extents.
            shape: what :meth:`ones` returned for it.
            reducer: a commutative reducer.
            before: applied to each element.
            value: instead of an element, computed from its position.
            name: of the stage.
        """
        read = value or (lambda *i: before(t(*i)))
        if self.static and not self.count:
            return te.compute(t.shape, lambda *i: read(*i), name=name)
        loops: list[Any] = []
        for d, (flag, extent) in enumerate(zip(self.flags, t.shape)):
            if flag is False:
                loops.append(None)
            else:
                end = extent if flag is True else tirx.Select(flag, extent, as_expr(1))
                loops.append(te.reduce_axis((as_expr(0), end), name=f"k{d}"))

        def body(*index: Any) -> Any:
            # where an axis is reduced the position is 0, where it is not its loop variable is: the sum is right for both
            at = [i if k is None else k.var if f is True else i + k.var for i, k, f in zip(index, loops, self.flags)]
            return reducer(read(*at), axis=[k for k in loops if k is not None])

        return te.compute([as_expr(d) for d in shape], body, name=name)
