"""Verilog written for the blocks of a family does what the portable Verilog does, given what the block does."""

import shutil

import node_cases as cases
import numpy as np
import pytest

from qcompile.codegen.fixed.program import Program
from qcompile.codegen.verilog import hardware, simulate, top

PORTS = [*(f"{side}{i}" for side in "ABC" for i in range(18)), "SIGNEDA", "SIGNEDB", "SOURCEA", "SOURCEB"]

MULT18X18D = f"""
module MULT18X18D (input CLK0, CE0, RST0, {", ".join(PORTS)}, output {", ".join(f"P{i}" for i in range(36))});
  parameter REG_INPUTA_CLK = "NONE", REG_INPUTB_CLK = "NONE", REG_PIPELINE_CLK = "NONE", REG_OUTPUT_CLK = "NONE";
  wire signed [17:0] a = {{{", ".join(f"A{i}" for i in reversed(range(18)))}}};
  wire signed [17:0] b = {{{", ".join(f"B{i}" for i in reversed(range(18)))}}};
  reg signed [17:0] ar, br;
  reg signed [35:0] pipeline, result;
  wire signed [17:0] ai = REG_INPUTA_CLK == "CLK0" ? ar : a, bi = REG_INPUTB_CLK == "CLK0" ? br : b;
  wire signed [35:0] product = ai * bi;
  wire signed [35:0] inner = REG_PIPELINE_CLK == "CLK0" ? pipeline : product;
  wire signed [35:0] p = REG_OUTPUT_CLK == "CLK0" ? result : inner;
  assign {{{", ".join(f"P{i}" for i in reversed(range(36)))}}} = p;
  always @(posedge CLK0) if (RST0) {{ar, br, pipeline, result}} <= 0;
  else if (CE0) begin
    ar <= a;
    br <= b;
    pipeline <= product;
    result <= inner;
  end
endmodule
"""
"""The registers and the signed product of the block, from its description."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("verilator") is None, reason="needs verilator")
@pytest.mark.parametrize("wide", [False, True])
def test_ecp5_multiplies_like_the_portable_unit(wide, tmp_path):
    rng = np.random.default_rng(0)
    step = cases.requantize(rng, 6)
    if wide:  # more than the block takes
        step = type(step)(step.multiplier * 2**12 + 1, step.shift + 12, step.low, step.high)
    node = cases.matvec(rng, step=step).folded(3, 4)
    netlist = hardware.make_netlist(Program("dut", node.inputs, (node,), (node.name,)))
    files = top.write(netlist, tmp_path)
    assert "multiply.v" in files
    (tmp_path / "multiply.v").write_text((top.RTL / "ecp5" / "multiply.v").read_text())
    (tmp_path / "mult18x18d.v").write_text(MULT18X18D)
    x = rng.integers(-128, 128, (100, 3, 12))
    simulator = simulate.build(tmp_path, "dut", ["mult18x18d.v", *files], netlist.inputs, netlist.outputs)
    results, _ = simulator.run({node.inputs[0].name: x})
    np.testing.assert_array_equal(results[node.name], node.reference(x).ravel())
