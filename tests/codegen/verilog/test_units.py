"""The Verilog of every node gives numpy's integers, with and without stalls, in exactly the cycles that `timing` computes."""

import itertools
import shutil
from dataclasses import replace

import node_cases as cases
import numpy as np
import pytest

from qcompile.codegen.fixed.nodes import Add, MatVec, Normalize, Transpose
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.fixed.stream import Stream
from qcompile.codegen.verilog import build, hardware, simulate, timing, tools, top
from qcompile.codegen.verilog.netlist import BLOCK_DEPTH, Netlist
from qcompile.errors import TargetError
from qcompile.formats.fixed import IntType
from qcompile.targets.fpga import TARGETS

FRAMES = 12
"""Frames whose cycles are counted."""

GROUPS = {
    "matvec": ("fc",),
    "windows": ("window", "depthwise", "average", "maxpool"),
    "elements": ("affine", "rescale", "clamp", "lookup", "add", "multiply", "concat", "prepend", "select", "transpose", "token_sum"),
    "rows": ("scores", "values", "softmax", "layer_norm", "rms_norm"),
}  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("verilator") is None, reason="needs verilator")


LONG = cases.VECTORS >= 10_000
"""Whether the tests that take an hour and more run."""


def choices(group, corners):
    """The nodes of a group in some foldings, given as positions in the lists of possible PE and SIMD."""
    for name, node in cases.nodes(np.random.default_rng(3)).items():
        if not name.startswith(GROUPS[group]):
            continue
        seen = set()
        for p, s in sorted(corners(name, node)):
            pe = node.pe_choices[min(p, len(node.pe_choices) - 1)]
            simd = node.simd_choices[min(s, len(node.simd_choices) - 1)]
            if (pe, simd) not in seen:
                seen.add((pe, simd))
                yield replace(node, name=f"{name}_{pe}_{simd}").folded(pe, simd)


def check(nodes, folder, count, simulator="verilator"):
    """All units side by side in one design give numpy's integers with and without stalls, and take the cycles computed."""
    rng = np.random.default_rng(3)
    whole, units, feeds = Netlist("dut"), [], {}
    for node in nodes:
        frames = cases.vectors(node, rng, count)
        inputs = []
        for i, (stream, lanes) in enumerate(zip(node.inputs, build.input_lanes(node))):
            beats = stream.tokens * stream.channels // lanes
            inputs.append(whole.input(f"{node.name}_in{i}", lanes, stream.type, beats))
            feeds[inputs[-1].name] = frames[i]
        first = len(whole.units)
        out = build.elaborate(node, whole, inputs)
        whole.output(out)
        alone = Netlist("alone")
        alone.units, alone.inputs, alone.outputs = whole.units[first:], inputs, [out]
        timing.size_fifos(alone)
        units.append((inputs, out, node.reference(*frames), timing.evaluate(alone, FRAMES).cycles(alone)))
    files = top.write(whole, folder)
    compiled = simulate.build(folder, "dut", files, whole.inputs, whole.outputs, simulator)
    for stalls in (0, 1, 2):
        results, _ = compiled.run(feeds, stalls)
        for _, out, expected, _ in units:
            np.testing.assert_array_equal(results[out.name], expected.ravel(), f"{out.name}, stalls {stalls}")
    _, traffic = compiled.run({name: x[:FRAMES] for name, x in feeds.items()})
    for inputs, out, _, cycles in units:
        took = traffic[out.name].last - min(traffic[c.name].first for c in inputs) + 1
        assert took == cycles, out.name


def middle(name, node):
    return {(len(node.pe_choices) // 2, len(node.simd_choices) // 2)}


def one_two_all(name, node):
    return set(itertools.product((0, 1, 99), repeat=2))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_units_are_exact_in_values_and_cycles(group, tmp_path):
    def corners(name, node):
        if name == "fc":
            return one_two_all(name, node)
        if name in ("fc_dsp", "fc_serial", "fc_serial_groups"):
            return {(0, 99), (99, 0), (1, 1), (99, 99)}
        return {(0, 0), (99, 99)} if group in ("elements", "windows") else middle(name, node)

    check(choices(group, corners), tmp_path, cases.VECTORS)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="takes long; with QCOMPILE_FPGA_VECTORS=10000")
@pytest.mark.parametrize("group", GROUPS)
def test_every_unit_is_exact_with_one_two_and_all_lanes(group, tmp_path):
    check(choices(group, one_two_all), tmp_path, 100)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="takes long; with QCOMPILE_FPGA_VECTORS=10000")
@pytest.mark.parametrize("group", GROUPS)
def test_cxxrtl_agrees(group, tmp_path):
    try:
        tools.cxxrtl()
    except TargetError as error:
        pytest.skip(str(error))
    check(choices(group, middle), tmp_path, cases.VECTORS, "cxxrtl")


@pytest.mark.parametrize("bits, fits", [(17, True), (18, False)])
def test_inputs_too_wide_to_square_are_refused_by_name(bits, fits):
    stream = Stream.of("wide", 2, 4, IntType(bits, True))
    node, netlist = Normalize("norm", (stream,), 1, centred=False), Netlist("dut")
    inputs = [netlist.input("x", build.input_lanes(node)[0], stream.type, 8)]
    if fits:
        assert build.elaborate(node, netlist, inputs)
        return
    with pytest.raises(TargetError, match="norm: its input has 18 bits"):
        build.elaborate(node, netlist, inputs)


@pytest.mark.slow
def test_what_waits_for_a_long_branch_is_held_in_block_memory(tmp_path):
    rng = np.random.default_rng(6)
    x = Stream.of("x", 24, 6, IntType(8, True))
    once = Transpose("once", (x,))
    twice = Transpose("twice", (once.output,))
    program = Program("dut", (x,), (once, twice, Add("both", (x, twice.output), (5, 3), 3, -128, 127)), ("both",))
    netlist = hardware.make_netlist(program)
    (fork,) = (u for u in netlist.units if u.deep)
    assert fork.depths["m0"] > BLOCK_DEPTH or fork.depths["m1"] > BLOCK_DEPTH
    assert timing.evaluate(netlist, 12).interval(netlist) == 24 * 6
    frames = rng.integers(-128, 128, (50, 24, 6))
    files = top.write(netlist, tmp_path)
    compiled = simulate.build(tmp_path, "dut", files, netlist.inputs, netlist.outputs)
    for stalls in (0, 1, 2):
        results, traffic = compiled.run({"x": frames}, stalls)
        np.testing.assert_array_equal(results["both"], program.reference({"x": frames})["both"].ravel())
        if not stalls:
            cycles = timing.evaluate(netlist, len(frames)).cycles(netlist)
            assert traffic["both"].last - traffic["x"].first + 1 == cycles


def chain(rng):
    x = Stream.of("x", 1, 24, IntType(8, True))
    nodes, source = [], x
    for name, n, pe, simd in (("a", 18, 3, 8), ("b", 12, 4, 6), ("c", 10, 5, 3)):
        weight = rng.integers(-8, 8, (source.channels, n))
        node = MatVec(name, (source,), weight, rng.integers(-99, 99, n), cases.requantize(rng, n)).folded(pe, simd)
        nodes.append(node)
        source = node.output
    return Program("chain", (x,), tuple(nodes), ("c",))


def test_frames_are_as_far_apart_as_the_later_one_of_two():
    netlist = Netlist("dut")
    netlist.outputs.append(netlist.input("y", 1, IntType(8, True), 2))
    late_every_other_time = {"y": [8, 10, 18, 20, 29, 31, 39, 41]}
    assert timing.Timeline(4, taken=late_every_other_time).interval(netlist) == 11


@pytest.mark.slow
@pytest.mark.parametrize("device", ["ecp5-85k", "xc7"])  # adders of two and of three
def test_constant_layers_in_a_row_are_one_pipeline(device, tmp_path):
    rng = np.random.default_rng(5)
    program = chain(rng)
    nodes, stream = [], program.inputs[0]
    for node in program.nodes:
        nodes.append(replace(node, inputs=(stream,), products="constant").folded(node.n, node.k))
        stream = nodes[-1].output
    program = replace(program, nodes=tuple(nodes))
    netlist = hardware.make_netlist(program, TARGETS[device])
    assert [u.module for u in netlist.units] == ["unrolled_c"]
    x = rng.integers(-128, 128, (300, 1, 24))
    files = top.write(netlist, tmp_path)
    simulator = simulate.build(tmp_path, "chain", files, netlist.inputs, netlist.outputs)
    for stalls in (0, 1):
        results, traffic = simulator.run({"x": x}, stalls)
        np.testing.assert_array_equal(results["c"], program.reference({"x": x})["c"].ravel())
        if not stalls:  # a frame per cycle
            assert traffic["c"].last - traffic["c"].first + 1 == len(x)


@pytest.mark.slow
@pytest.mark.parametrize("simulator", ["verilator", "cxxrtl"])
def test_a_pipeline_is_as_fast_as_its_slowest_node(simulator, tmp_path):
    if simulator == "cxxrtl":
        try:
            tools.cxxrtl()
        except TargetError as error:
            pytest.skip(str(error))
    rng = np.random.default_rng(4)
    program = chain(rng)
    if simulator == "cxxrtl":  # its C++ takes long to compile
        program = replace(program, nodes=program.nodes[:2], outputs=("b",))
    (last,) = program.outputs
    netlist = hardware.make_netlist(program)
    slowest = max(node.interval for node in program.nodes)
    line = timing.evaluate(netlist, 40)
    assert line.interval(netlist) == slowest
    x = rng.integers(-128, 128, (40, 1, 24))
    files = top.write(netlist, tmp_path)
    compiled = simulate.build(tmp_path, "chain", files, netlist.inputs, netlist.outputs, simulator)
    for stalls in (0, 1, 2):
        results, traffic = compiled.run({"x": x}, stalls)
        np.testing.assert_array_equal(results[last], program.reference({"x": x})[last].ravel())
        if not stalls:
            assert traffic[last].last - traffic["x"].first + 1 == line.cycles(netlist)
