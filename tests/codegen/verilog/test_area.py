"""Area before synthesis is near what Yosys finds."""

import node_cases as cases
import numpy as np
import pytest

from qcompile.codegen.fixed.program import Program
from qcompile.codegen.verilog import area, hardware, synthesize, tools, top
from qcompile.targets.fpga import TARGETS


@pytest.mark.slow
@pytest.mark.skipif(tools.find("yosys") is None, reason="needs yosys")
@pytest.mark.parametrize("device", ["ecp5-85k", "xc7"])
@pytest.mark.parametrize("products", ["lut", "constant"])
def test_look_up_tables_are_foretold_within_a_fifth(device, products, tmp_path):
    node = cases.matvec(np.random.default_rng(0), tokens=1, k=32, n=8, products=products)
    node = node.folded(8, 32) if products == "constant" else node.folded(4, 4)
    netlist = hardware.make_netlist(Program("dut", node.inputs, (node,), (node.name,)))
    files = top.write(netlist, tmp_path)
    found = synthesize.synthesize(tmp_path, "dut", files, TARGETS[device])
    guess = sum(area.estimate(u, TARGETS[device]).luts for u in netlist.units)
    assert abs(guess / found.luts - 1) < 0.2
