"""CUDA kernel families, written in TIRx with PTX instructions: `sliced` and `persistent` for one row, `stream` for few, `tiled` and `shared` for many,
`planes` for widths that have no other."""

from qcompile.codegen.kernels.cuda.linear import CudaLinear
from qcompile.codegen.kernels.cuda.persistent import PersistentLinear, PersistentLinearFloat8, PersistentLinearInt8
from qcompile.codegen.kernels.cuda.planes import PlaneLinear
from qcompile.codegen.kernels.cuda.shared import SharedLinearFloat8, SharedLinearInt8
from qcompile.codegen.kernels.cuda.sliced import SlicedLinear
from qcompile.codegen.kernels.cuda.stream import StreamLinear, StreamLinearFloat8, StreamLinearInt8
from qcompile.codegen.kernels.cuda.tiled import TiledLinear, TiledLinearFloat8, TiledLinearInt8

FAMILIES: tuple[type[CudaLinear], ...] = (
    StreamLinear,
    StreamLinearInt8,
    StreamLinearFloat8,
    PersistentLinear,
    PersistentLinearInt8,
    PersistentLinearFloat8,
    SlicedLinear,
    TiledLinear,
    TiledLinearInt8,
    TiledLinearFloat8,
    SharedLinearInt8,
    SharedLinearFloat8,
    PlaneLinear,
)
"""Linear families, the one to prefer among equals first."""
