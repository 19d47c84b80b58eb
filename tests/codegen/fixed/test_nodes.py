"""Every node gives the same integers in numpy, in TIR through LLVM, in C99 and in HLS C++, at corners, at ties and at random."""

import shutil
import subprocess

import numpy as np
import pytest
import tests_fixed_cases as cases

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
    frames = cases.vectors(node, np.random.default_rng(1), 20)
    expected = node.output.check(node.reference(*frames))  # raises where a value leaves its range
    np.testing.assert_array_equal(tir.compile(node)(*frames), expected)


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="needs gcc and g++")
def test_c99_and_hls_equal_numpy_without_undefined_behaviour(nodes, tmp_path):
    # One program with all nodes: each reads inputs of its own.
    chosen = [middle(node) for node in nodes.values()]
    for node in chosen:
        folder = tmp_path / node.name
        folder.mkdir()
    rng = np.random.default_rng(2)
    for node in chosen[:: max(1, len(chosen) // 12)]:
        folder = tmp_path / node.name
        frames = cases.vectors(node, rng, 200)
        expected = node.reference(*frames)
        program = Program("prog", node.inputs, (node,), (node.name,))
        vectors = {**{s.name: f[:8] for s, f in zip(node.inputs, frames)}, node.name: expected[:8]}
        for file, text in c_program.sources(program, vectors).items():
            (folder / file).write_text(text)
        flags = "-std=c99 -Wall -Wextra -pedantic -Werror -fsanitize=undefined -fno-sanitize-recover=all -O1"
        subprocess.run(["gcc", *flags.split(), "main.c", "prog.c", "-o", "c"], cwd=folder, check=True)
        assert subprocess.run(["./c"], cwd=folder, capture_output=True, check=True).stdout.startswith(b"PASS")
        given = b"".join(f[i].astype(s.type.dtype).tobytes() for i in range(200) for s, f in zip(node.inputs, frames))
        done = subprocess.run(["./c", "-"], cwd=folder, input=given, capture_output=True, check=True)
        np.testing.assert_array_equal(np.frombuffer(done.stdout, node.output.type.dtype), expected.ravel(), node.name)

        lanes = {s.name: 1 for s in [*node.inputs, node.output]}
        for file, text in hls_program.sources(program, lanes).items():
            (folder / file).write_text(text)
        subprocess.run(
            ["g++", "-std=c++14", "-O1", f"-I{hls_program.INCLUDE}", "testbench.cpp", "prog.cpp", "-o", "hls"],
            cwd=folder, check=True,
        )  # fmt: skip
        given = b"".join(f[i].astype(np.int64).tobytes() for i in range(200) for f in frames)
        done = subprocess.run(["./hls"], cwd=folder, input=given, capture_output=True, check=True)
        np.testing.assert_array_equal(np.frombuffer(done.stdout, np.int64), expected.ravel(), node.name)
