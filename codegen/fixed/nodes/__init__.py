"""The nodes of fixed-point programs."""

from qcompile.codegen.fixed.nodes.attention import MatMul, Softmax
from qcompile.codegen.fixed.nodes.base import Folding, Node
from qcompile.codegen.fixed.nodes.elementwise import Add, Affine, Lookup, Multiply
from qcompile.codegen.fixed.nodes.geometry import Geometry
from qcompile.codegen.fixed.nodes.matvec import MatVec
from qcompile.codegen.fixed.nodes.movement import Concat, Prepend, Select, Transpose
from qcompile.codegen.fixed.nodes.normalize import Normalize
from qcompile.codegen.fixed.nodes.reduce import TokenSum
from qcompile.codegen.fixed.nodes.window import Depthwise, MaxPool, Window

__all__ = [
    "Add",
    "Affine",
    "Concat",
    "Depthwise",
    "Folding",
    "Geometry",
    "Lookup",
    "MatMul",
    "MatVec",
    "MaxPool",
    "Multiply",
    "Node",
    "Normalize",
    "Prepend",
    "Select",
    "Softmax",
    "TokenSum",
    "Transpose",
    "Window",
]
