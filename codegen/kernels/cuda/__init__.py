"""CUDA kernel families, written in TIRx with PTX instructions: `stream` for few rows, `tiled` for many."""

from qcompile.codegen.kernels.cuda.linear import CudaLinear
from qcompile.codegen.kernels.cuda.stream import StreamLinear, StreamLinearInt8
from qcompile.codegen.kernels.cuda.tiled import TiledLinear, TiledLinearInt8

FAMILIES: tuple[type[CudaLinear], ...] = (StreamLinear, StreamLinearInt8, TiledLinear, TiledLinearInt8)
"""Linear families, the one to prefer among equals first."""
