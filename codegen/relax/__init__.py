"""ONNX models as TVM Relax programs: conversion, lowering and compilation for CPUs (and, unscheduled, any TVM target)."""

from qcompile.codegen.relax.context import Context, Known
from qcompile.codegen.relax.convert import to_relax
from qcompile.codegen.relax.pipeline import compile_relax, lower
from qcompile.codegen.relax.program import RelaxProgram, TensorSpec
from qcompile.codegen.relax.registry import converter, converters, registered

__all__ = [
    "Context",
    "Known",
    "RelaxProgram",
    "TensorSpec",
    "compile_relax",
    "converter",
    "converters",
    "lower",
    "registered",
    "to_relax",
]
