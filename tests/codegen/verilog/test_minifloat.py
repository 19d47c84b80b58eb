"""Dot products of minifloats: the Verilog gives the integers of numpy, exactly, in the cycles that are computed."""

import shutil

import numpy as np
import pytest

from qcompile.codegen.verilog import minifloat, simulate, timing, top
from qcompile.codegen.verilog.netlist import Netlist
from qcompile.formats import parse_format
from qcompile.formats.fixed import IntType
from qcompile.formats.floats import Minifloat

PAIRS = [("e2m1", "e2m1"), ("e1m2", "e3m0"), ("e3m2", "e2m3"), ("e4m3", "e4m3"), ("e5m2", "e2m0"), ("e1m0", "e1m6")]


@pytest.mark.parametrize("spelling", ["e2m1", "e3m2", "e1m2", "e3m0", "e4m2"])
def test_integers_are_the_levels_of_the_format(spelling):
    fmt = parse_format(spelling)
    assert isinstance(fmt, Minifloat)
    levels, integers = fmt.table.astype(np.float64), minifloat.integers(fmt)
    used = integers != 0
    np.testing.assert_array_equal(used, levels != 0)
    assert len(np.unique(levels[used] / integers[used])) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("verilator") is None, reason="needs verilator")
def test_sums_are_exact_with_and_without_stalls(tmp_path):
    rng, length, frames = np.random.default_rng(0), 5, 60
    netlist, feeds, wanted = Netlist("dut"), {}, {}
    for i, names in enumerate(PAIRS):
        formats = [parse_format(n) for n in names]
        codes = [rng.integers(0, 1 << f.bits, (frames, 3, length)) for f in formats]
        codes[0][0], codes[1][0] = (int(minifloat.integers(f).argmax()) for f in formats)
        channels = []
        for f, c, side in zip(formats, codes, "xw"):
            channels.append(netlist.input(f"{side}{i}", 1, IntType(f.bits, False), 3 * length))
            feeds[channels[-1].name] = c
        out = minifloat.dot(netlist, *formats, length, tuple(channels))
        netlist.units[-1].name = f"dot{i}"
        netlist.output(out)
        wanted[out.name] = np.prod([minifloat.integers(f)[c] for f, c in zip(formats, codes)], axis=0).sum(-1).ravel()
    timing.size_fifos(netlist)
    files = top.write(netlist, tmp_path)
    simulator = simulate.build(tmp_path, "dut", files, netlist.inputs, netlist.outputs)
    for stalls in (0, 1, 2):
        results, traffic = simulator.run(feeds, stalls)
        for name, expected in wanted.items():
            np.testing.assert_array_equal(results[name], expected, name)
    _, traffic = simulator.run(feeds)
    cycles = timing.evaluate(netlist, frames).cycles(netlist)
    ports = [traffic[c.name] for c in (*netlist.inputs, *netlist.outputs)]
    assert max(t.last for t in ports) - min(t.first for t in ports) + 1 == cycles
