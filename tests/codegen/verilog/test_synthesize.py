"""Synthesis: paths with spaces work, and the parts of a design add up to the whole."""

import shutil

import node_cases as cases
import numpy as np
import pytest

from qcompile.codegen.fixed.program import Program
from qcompile.codegen.verilog import hardware, synthesize, tools, top
from qcompile.targets.fpga import TARGETS

pytestmark = pytest.mark.skipif(tools.find("yosys") is None, reason="needs yosys")


@pytest.mark.slow
def test_parts_add_up_to_the_whole_wherever_the_files_are(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    shutil.copytree(top.RTL, tmp_path / "the units")
    monkeypatch.setattr(synthesize, "RTL", tmp_path / "the units")
    rng = np.random.default_rng(0)
    first = cases.matvec(rng, "first", step=cases.requantize(rng, 6)).folded(3, 4)
    second = cases.Lookup("second", (first.output,), rng.integers(-128, 128, 256)).folded(3, 1)
    program = Program("dut", first.inputs, (first, second), ("second",))
    netlist = hardware.make_netlist(program)
    files = top.write(netlist, folder)
    device = TARGETS["ecp5-25k"]
    whole = synthesize.synthesize(folder, "dut", files, device)
    assert whole.multipliers == 1  # rtl/ecp5/multiply.v was found
    parts = synthesize.by_unit(folder, "dut", files, device)
    assert set(parts) == {f"u_{u.name}" for u in netlist.units}
    for name in ("luts", "flipflops", "multipliers"):
        total = sum(getattr(p, name) for p in parts.values())
        assert abs(total - getattr(whole, name)) <= 0.1 * getattr(whole, name) + 5
