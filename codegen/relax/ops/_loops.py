"""Kernels written as loops and stores, for what is not a function of the output position alone.

Scatters with reductions, sorting, recurrences and searches need loops that depend on each other. ``loops`` emits such a
kernel for tensors of any rank; inside, ``grid``, ``store``, ``when`` and local scalars build the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import relax, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qcompile.codegen.relax.context import OPAQUE_PATTERN, Context
from qcompile.codegen.relax.dims import Dim, as_expr

#: Keeps a kernel from being merged with others.
OPAQUE = {"op_pattern": OPAQUE_PATTERN}


def loops(
    ctx: Context,
    body: Callable[..., None],
    args: Sequence[relax.Expr],
    outputs: Sequence[tuple[Sequence[Dim], str]],
    *,
    name: str,
) -> list[relax.Expr]:
    """Emits a kernel whose body is built by ``body(*inputs, *outputs)`` on TIR buffers.

    Args:
        ctx: the conversion.
        body: called once, inside an IR builder.
        args: tensors read.
        outputs: shape and dtype of each tensor written; their contents are undefined at first.
        name: of the kernel.
    """

    def generate(ins: Sequence[Any], outs: Sequence[Any]) -> Any:
        with IRBuilder() as ib:
            with T.attr(tirx.const(0, "int32"), "kernel_body", tirx.const(1, "int32")):
                body(*ins, *outs)
            return ib.get()

    def build(*xs: te.Tensor) -> Any:
        shapes = [[as_expr(d) for d in shape] for shape, _ in outputs]
        made = te.extern(shapes, list(xs), generate, dtype=[dtype for _, dtype in outputs], name=name)
        return [made] if isinstance(made, te.Tensor) else list(made)

    return ctx.te(build, *args, name=name, attrs=OPAQUE)


@contextmanager
def grid(*extents: Dim) -> Iterator[list[Any]]:
    """Nested serial loops over the extents; yields the loop variables."""
    if not extents:
        yield []
        return
    with T.grid(*(as_expr(e) for e in extents)) as variables:
        yield [variables] if isinstance(variables, tirx.Var) else list(variables)


@contextmanager
def loop(start: Dim, stop: Dim) -> Iterator[Any]:
    """One serial loop."""
    with T.serial(as_expr(start), as_expr(stop)) as variable:
        yield variable


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """The statements inside run if the condition holds."""
    with T.If(condition), T.Then():
        yield


def store(buffer: Any, index: Sequence[Any], value: Any) -> None:
    """``buffer[index] = value``."""
    T.buffer_store(buffer, value, [as_expr(i) if isinstance(i, int) else i for i in index])


def load(buffer: Any, index: Sequence[Any]) -> Any:
    """``buffer[index]``."""
    return tirx.BufferLoad(buffer, [as_expr(i) if isinstance(i, int) else i for i in index])


def scalar(dtype: str) -> Any:
    """A local variable, as a buffer of one element: ``store(v, [0], x)``, ``load(v, [0])``."""
    return T.alloc_buffer([1], dtype, scope="global")


def scratch(shape: Sequence[Dim], dtype: str) -> Any:
    """Working memory of the kernel."""
    return T.alloc_buffer([as_expr(d) for d in shape], dtype, scope="global")


def check(condition: Any, message: str) -> None:
    """Stops the program with an error unless the condition holds."""
    with T.Assert(condition, message):
        T.evaluate(0)
