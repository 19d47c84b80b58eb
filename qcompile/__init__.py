"""qcompile: a compiler for quantized neural networks."""
