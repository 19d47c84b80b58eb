"""A whole program as HLS C++: node functions joined by arrays in a dataflow region, streams of beats at both ends."""

from __future__ import annotations

from pathlib import Path

from qcompile.codegen.fixed.emit.c_program import environment
from qcompile.codegen.fixed.emit.hls import HELPERS, Hls
from qcompile.codegen.fixed.emit.printer import function_name, node_function
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.fixed.stream import Stream

INCLUDE = Path(__file__).parent / "include"
"""Headers that stand in for those of the synthesis tool when the program is simulated with an ordinary compiler."""


def sources(program: Program, lanes: dict[str, int]) -> dict[str, str]:
    """The files of ``program``: ``NAME.cpp``, ``NAME.h`` and ``testbench.cpp``.

    Args:
        program: any.
        lanes: elements per beat of every input and output.
    """
    dialect = Hls()
    outputs = [program.streams[name] for name in program.outputs]

    def kind(stream: Stream) -> str:
        return dialect.type(stream.type.dtype, stream.type)

    # In a dataflow region an array has one reader, and keeps its shape: every further reader and shape is a copy.
    arrays: list[tuple[str, Stream]] = [(f"{s.name}_frame", s) for s in program.inputs]
    calls: list[str] = []
    copies: list[tuple[str, Stream, list[tuple[str, Stream]]]] = []
    pending: dict[str, list[str]] = {}

    def publish(stream: Stream, source: str) -> None:
        views = [s for n in program.nodes for s in n.inputs if s.name == stream.name]
        views += [stream] * program.outputs.count(stream.name)
        names = []
        for index, view in enumerate(views):
            if len(views) == 1 and view.shape == stream.shape:
                names.append(source)
                continue
            name = f"{stream.name}_view{index}"
            arrays.append((name, view))
            names.append(name)
        if names != [source]:
            copies.append((f"{stream.name}_copy", stream, list(zip(names, views))))
            calls.append(f"{stream.name}_copy({', '.join([source, *names])});")
        pending[stream.name] = names

    for stream in program.inputs:
        publish(stream, f"{stream.name}_frame")
    for node in program.nodes:
        arguments = [pending[s.name].pop(0) for s in node.inputs]
        arrays.append((node.name + "_frame", node.output))
        calls.append(f"{function_name(node)}({', '.join([*arguments, node.name + '_frame'])});")
        publish(node.output, node.name + "_frame")
    results = {name: pending[name].pop(0) for name in program.outputs}
    values = dict(
        name=program.name,
        guard=f"{program.name.upper()}_HLS_H",
        inputs=list(program.inputs),
        outputs=outputs,
        lanes=lanes,
        kind=kind,
        helpers=HELPERS,
        functions=[node_function(node, dialect) for node in program.nodes],
        copies=copies,
        arrays=arrays,
        calls=calls,
        results=results,
    )
    return {
        f"{program.name}.cpp": environment().get_template("hls.cpp.j2").render(values),
        f"{program.name}.h": environment().get_template("hls.h.j2").render(values),
        "testbench.cpp": environment().get_template("hls_testbench.cpp.j2").render(values),
    }
