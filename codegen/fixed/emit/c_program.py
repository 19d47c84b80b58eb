"""A whole program as C99: one source file, one header, and a main that runs vectors. No allocation, no library functions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
import numpy as np

from qcompile.codegen.fixed.emit.c99 import C99, HELPERS
from qcompile.codegen.fixed.emit.printer import array, function_name, node_function
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.fixed.stream import Stream


@cache
def environment() -> jinja2.Environment:
    """The templates beside this module."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def sources(program: Program, vectors: dict[str, np.ndarray] | None = None) -> dict[str, str]:
    """The files of ``program``: ``NAME.c``, ``NAME.h``, ``main.c``, ``vectors.h``.

    Args:
        program: any.
        vectors: a few frames ``(V, tokens, channels)`` of every input and output, for ``main`` without arguments.
    """
    dialect = C99()
    outputs = [program.streams[name] for name in program.outputs]

    def kind(stream: Stream) -> str:
        return dialect.type(stream.type.dtype)

    def seen(stream: Stream, name: str, const: bool) -> str:
        """An argument: the memory of a stream with the shape its reader gives it."""
        return f"({'const ' if const else ''}{kind(stream)}(*)[{stream.channels}]){name}"

    calls = []
    for node in program.nodes:
        arguments = [seen(s, s.name, True) for s in node.inputs]
        target = node.output
        calls.append(f"{function_name(node)}({', '.join([*arguments, seen(target, target.name, False)])});")
    inner = [n.output for n in program.nodes if n.name not in program.outputs]
    frames = vectors or {}
    values = dict(
        name=program.name,
        guard=f"{program.name.upper()}_H",
        inputs=program.inputs,
        outputs=outputs,
        kind=kind,
        helpers=HELPERS,
        functions=[node_function(node, dialect) for node in program.nodes],
        buffers=inner,
        calls=calls,
        frames=len(next(iter(frames.values()))) if frames else 0,
        array=lambda name: array(frames[name].reshape(-1)),
    )
    return {
        f"{program.name}.c": environment().get_template("program.c.j2").render(values),
        f"{program.name}.h": environment().get_template("program.h.j2").render(values),
        "main.c": environment().get_template("main.c.j2").render(values),
        "vectors.h": environment().get_template("vectors.h.j2").render(values),
    }
