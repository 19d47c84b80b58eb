"""Replace calls of the C math library by arithmetic that stays in vector registers.

TVM lowers ``exp`` and its kin to one library call per element, which also keeps LLVM from vectorising the loop around
it. The float32 ones are rewritten with the polynomials of `qcompile.codegen.kernels.cpu.vmath`, small constant powers as
products.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad

from qcompile.codegen.kernels.cpu import vmath

_FUNCTIONS = {"exp": vmath.exp, "erf": vmath.erf, "tanh": vmath.tanh, "sigmoid": vmath.sigmoid}


def allows_vector_math(node: Any) -> bool:
    """Whether `use_vector_math` may be applied to a function's body.

    The polynomials bind their argument with ``Let``, and the passes that emulate bfloat16 and narrower floats leave
    reads inside of such bindings as they are (TVM 0.27).
    """
    emulated = False

    def visit(load: TensorLoad) -> None:
        nonlocal emulated
        dtype = str(load.source.dtype)
        emulated = emulated or dtype == "bfloat16" or dtype.startswith(("float8", "float6", "float4"))

    tvm_ffi.structural_walk(node, (TensorLoad, visit))
    return not emulated


def use_vector_math(node: Any) -> Any:
    """``node`` (an expression or statement) with every float32 call that has a polynomial rewritten."""
    return tvm_ffi.structural_map(node, (Call, _rewrite), order="post")


def _rewrite(call: Call) -> Any:
    name = str(getattr(call.op, "name", ""))
    if not name.startswith("tirx.") or str(call.ty.dtype) != "float32":
        return call
    name = name.removeprefix("tirx.")
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](call.args[0])
    if name == "pow":
        return _power(call, *call.args)
    return call


def _power(call: Call, base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, tirx.FloatImm):
        return call
    value = float(exponent.value)
    if value == 0.5:
        return call  # differs from sqrt at -0 and -inf, and nobody writes it in a hot loop
    if value not in (2.0, 3.0, 4.0, -1.0):
        return call
    var = tirx.Var("base", base.ty)
    if value == -1.0:
        product: Any = tirx.const(1.0, "float32") / var
    elif value == 4.0:
        square = tirx.Var("square", base.ty)
        product = tirx.Let(square, var * var, square * square)
    else:
        product = var * var if value == 2.0 else var * var * var
    return tirx.Let(var, base, product)
