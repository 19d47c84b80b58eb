"""Fixed-point programs as Verilog-2005: a library of streaming units, the netlist that joins them, and its simulation."""
