"""Every node of a fixed-point program as a TIR function on one frame, and its schedule.

Importing the package registers all nodes with `qcompile.codegen.fixed.tir.build`.
"""

from qcompile.codegen.fixed.tir import attention, elementwise, matvec, window
from qcompile.codegen.fixed.tir.build import compile, lower, prim_func, scheduled

__all__ = ["attention", "compile", "elementwise", "lower", "matvec", "prim_func", "scheduled", "window"]
