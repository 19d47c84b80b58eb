"""CUDA kernel families, written in TIRx with PTX instructions; see `stream` for the linear operators."""

from qcompile.codegen.kernels.cuda.stream import StreamLinear, StreamLinearInt8

FAMILIES = (StreamLinear, StreamLinearInt8)
"""Linear families, the one to prefer among equals first."""
