"""Adders of three: sums of two are joined without changing what is computed, and the tables named for 7 series add."""

import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.verilog import ternary, tools
from qcompile.codegen.verilog.adder_graph import constant_matrix
from qcompile.codegen.verilog.dataflow import Dataflow, adder_tables
from qcompile.codegen.verilog.top import RTL


def evaluate(flow, x):
    """Outputs on vectors ``(V, K)``; every word stays in its range."""
    values = []
    for i, word in enumerate(flow.words):
        if word.kind == "input":
            values.append(x[:, i])
        elif word.kind == "constant":
            values.append(np.full(len(x), word.low))
        else:
            values.append(sum(t.sign * (values[t.value] << t.shift) for t in word.operands))
            if word.kind == "clamp":
                values[-1] = np.clip(values[-1], word.low, word.high)
        assert word.low <= values[-1].min() and values[-1].max() <= word.high
    return np.stack([values[o] for o in flow.outputs], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 9), st.integers(1, 7), st.booleans(), st.integers(0, 10**6))
def test_joined_sums_are_the_same_matrix_in_fewer_tables(k, n, bits, signed, seed):
    rng = np.random.default_rng(seed)
    weight, bias = rng.integers(-(1 << bits) + 1, 1 << bits, (k, n)), rng.integers(-9, 9, n)
    low, high = (np.full(k, -8), np.full(k, 7)) if signed else (np.zeros(k, int), np.full(k, 15))
    graph = constant_matrix(weight, bias, low, high)
    flow = Dataflow()
    inputs = [flow.input(int(a), int(b)) for a, b in zip(low, high)]
    flow.outputs = [flow.clamped(t, -(1 << 60), 1 << 60) for t in flow.sums(graph, inputs)]

    def tables():
        return sum(adder_tables(flow.words, w) for w in flow.words if w.kind == "add")

    before, adders = tables(), sum(w.kind == "add" for w in flow.words)
    ternary.fuse(flow)
    x = np.concatenate([low[None], high[None], rng.integers(low, high + 1, (50, k))])
    np.testing.assert_array_equal(evaluate(flow, x), x @ weight + bias)
    joined = sum(len(w.operands) == 3 for w in flow.words)
    assert adders == joined + sum(w.kind == "add" for w in flow.words)
    assert tables() <= before
    for word in flow.words:  # three that are all subtracted have no unit
        assert len(word.operands) < 3 or word.operands[0].sign > 0 or any(t.sign > 0 for t in word.operands)


@pytest.mark.skipif(tools.find("yosys") is None, reason="needs yosys")
def test_tables_of_7_series_equal_the_portable_adder(tmp_path):
    script = []
    for width, masks in ((1, (0, 6)), (6, range(7))):
        for mask in masks:
            choose = (
                f"hierarchy -top ternary_adder -chparam WIDTH {width} -chparam NEGATIVE {mask}; "
                "proc; flatten; rename -top side; opt_clean"
            )
            script += [
                f'design -reset; read_verilog -defer "{RTL / "ternary_adder.v"}"; {choose}; design -stash gold',
                f'read_verilog -defer "{RTL / "xc7" / "ternary_adder.v"}"; read_verilog cells.v; {choose}; design -stash gate',
                "design -copy-from gold -as gold side; design -copy-from gate -as gate side",
                "miter -equiv -flatten gold gate miter; hierarchy -top miter; sat -verify -prove trigger 0 miter",
            ]
    (tmp_path / "cells.v").write_text(CELLS)
    (tmp_path / "prove.ys").write_text("\n".join(script) + "\n")
    done = subprocess.run([*tools.require("yosys"), "-q", "prove.ys"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CELLS = """
module LUT6_2 #(parameter [63:0] INIT = 0) (input I0, I1, I2, I3, I4, I5, output O5, O6);  // UG474, figure 2-3
  assign O5 = INIT[{1'b0, I4, I3, I2, I1, I0}];
  assign O6 = INIT[{I5, I4, I3, I2, I1, I0}];
endmodule
module CARRY4 (input CI, CYINIT, input [3:0] DI, S, output [3:0] O, CO);  // UG474, figure 2-24
  wire [4:0] c = {CO, CI | CYINIT};
  assign CO = (S & c[3:0]) | (~S & DI);
  assign O = S ^ c[3:0];
endmodule
"""
"""The two cells as their documents describe them."""
