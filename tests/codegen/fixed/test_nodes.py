"""Every node gives the same integers in numpy, in TIR through LLVM, in C99 and in HLS C++, at corners, at ties and at random."""

import shutil
import subprocess

import node_cases as cases
import numpy as np
import pytest

from qcompile.codegen.fixed import tir
from qcompile.codegen.fixed.emit import c_program, hls_program
from qcompile.codegen.fixed.program import Program

NAMES = sorted(cases.nodes(np.random.default_rng(0)))


@pytest.fixture(scope="module")
def nodes():
    return cases.nodes(np.random.default_rng(0))


def middle(node):
    return node.folded(node.pe_choices[len(node.pe_choices) // 2], node.simd_choices[len(node.simd_choices) // 2])


@pytest.mark.parametrize("name", NAMES)
def test_llvm_equals_numpy_and_ranges_hold(nodes, name):
    node = middle(nodes[name])
    frames = cases.vectors(node, np.random.default_rng(1), cases.VECTORS // 10)
    expected = node.output.check(node.reference(*frames))  # raises where a value leaves its range
    np.testing.assert_array_equal(tir.compile(node)(*frames), expected)


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="needs gcc and g++")
def test_c99_and_hls_equal_numpy_without_undefined_behaviour(nodes, tmp_path):
    # One program with all nodes: each reads inputs of its own, or shares them.
    chosen = [middle(node) for node in nodes.values()]
    streams = {s.name: s for node in chosen for s in node.inputs}
    program = Program("prog", tuple(streams.values()), tuple(chosen), tuple(node.name for node in chosen))
    frames = cases.frames(streams.values(), np.random.default_rng(2), cases.VECTORS)
    expected = program.reference(frames)
    few = {name: values[:8] for name, values in {**frames, **expected}.items()}
    for file, text in c_program.sources(program, few).items():
        (tmp_path / file).write_text(text)
    level = "-O1" if cases.VECTORS > 1000 else "-O0"  # compiling takes longer than running few
    flags = "-std=c99 -Wall -Wextra -pedantic -Werror -fsanitize=undefined -fno-sanitize-recover=all"
    subprocess.run(["gcc", level, *flags.split(), "main.c", "prog.c", "-o", "c"], cwd=tmp_path, check=True)
    assert subprocess.run(["./c"], cwd=tmp_path, capture_output=True, check=True).stdout.startswith(b"PASS")
    _equal(tmp_path / "c", ["-"], program, frames, expected, lambda stream: stream.type.dtype)

    lanes = {s.name: 1 for s in program.streams.values()}
    for file, text in hls_program.sources(program, lanes).items():
        (tmp_path / file).write_text(text)
    subprocess.run(
        ["g++", "-std=c++14", level, f"-I{hls_program.INCLUDE}", "testbench.cpp", "prog.cpp", "-o", "hls"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    _equal(tmp_path / "hls", [], program, frames, expected, lambda stream: "int64")


def _equal(binary, arguments, program, frames, expected, dtype):
    """A program that reads frames from its input and writes them to its output gives what is expected."""

    def record(names):
        streams = [program.streams[name] for name in names]
        return np.dtype([(s.name, dtype(s), s.shape) for s in streams])

    given = np.empty(cases.VECTORS, record([s.name for s in program.inputs]))
    for name in given.dtype.names:
        given[name] = frames[name]
    done = subprocess.run([binary, *arguments], input=given.tobytes(), capture_output=True, check=True)
    results = np.frombuffer(done.stdout, record(program.outputs))
    for name in program.outputs:
        np.testing.assert_array_equal(results[name], expected[name], name)
