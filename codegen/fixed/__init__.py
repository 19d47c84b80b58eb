"""Fixed-point programs: integers from the input to the output, with an exact range for every channel.

    importer/     from a quantized ONNX model to a program
    stream.py     what flows between nodes: frames of integers, their ranges
    nodes/        the operators: numpy definitions, ranges, foldings
    program.py    nodes in order
    tir/          the same operators in TIR, scheduled
    emit/         C99 and HLS C++ from the TIR, an ONNX model of integer operators
    rounding.py   roundings other than half to even

The hardware of a program is in `qcompile.codegen.verilog`.
"""
