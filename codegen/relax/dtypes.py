"""How ONNX element types are stored in a compiled program.

TVM computes natively on the IEEE floats, bfloat16, the byte-sized integers and bool. The types narrower than a byte and the
8-bit floats are *stored* one element per byte (``int8``/``uint8``); for the floats the byte is the bit pattern. Only Cast
and the quantization operators look inside such a byte, everything that moves data around works on it unchanged.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_D = ir.DataType

#: ONNX type -> the dtype a tensor of it has in Relax.
STORAGE: dict[ir.DataType, str] = {
    _D.FLOAT: "float32",
    _D.DOUBLE: "float64",
    _D.FLOAT16: "float16",
    _D.BFLOAT16: "bfloat16",
    _D.INT8: "int8",
    _D.INT16: "int16",
    _D.INT32: "int32",
    _D.INT64: "int64",
    _D.UINT8: "uint8",
    _D.UINT16: "uint16",
    _D.UINT32: "uint32",
    _D.UINT64: "uint64",
    _D.BOOL: "bool",
    _D.INT4: "int8",
    _D.UINT4: "uint8",
    _D.INT2: "int8",
    _D.UINT2: "uint8",
    _D.FLOAT8E4M3FN: "uint8",
    _D.FLOAT8E4M3FNUZ: "uint8",
    _D.FLOAT8E5M2: "uint8",
    _D.FLOAT8E5M2FNUZ: "uint8",
    _D.FLOAT8E8M0: "uint8",
    _D.FLOAT4E2M1: "uint8",
}

#: Types held as a bit pattern in a byte.
BIT_PATTERN = frozenset(
    {
        _D.FLOAT8E4M3FN,
        _D.FLOAT8E4M3FNUZ,
        _D.FLOAT8E5M2,
        _D.FLOAT8E5M2FNUZ,
        _D.FLOAT8E8M0,
        _D.FLOAT4E2M1,
    }
)

#: Integer types held as a sign- or zero-extended byte.
NARROW_INTEGER = frozenset({_D.INT4, _D.UINT4, _D.INT2, _D.UINT2})

_NATIVE = {name: dtype for dtype, name in STORAGE.items() if dtype not in BIT_PATTERN and dtype not in NARROW_INTEGER}


def native(storage: str) -> ir.DataType:
    """The ONNX type whose values a tensor of dtype ``storage`` holds when nothing else is known."""
    return _NATIVE[storage]


def to_storage(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """``array`` (elements of ONNX type ``dtype``) in the form the program stores it; no copy where none is needed."""
    if dtype in BIT_PATTERN:
        return np.ascontiguousarray(array).view(np.uint8)
    if dtype in NARROW_INTEGER:
        return array.astype(STORAGE[dtype])
    return array


def from_storage(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Inverse of :func:`to_storage`: the array with numpy's (or ml_dtypes') own type for ``dtype``."""
    if dtype in BIT_PATTERN:
        return array.view(dtype.numpy())
    if dtype in NARROW_INTEGER:
        return array.astype(dtype.numpy())
    return array


def numpy_dtype(storage: str) -> np.dtype:
    """The numpy dtype of a storage dtype name."""
    return np.dtype(ml_dtypes.bfloat16 if storage == "bfloat16" else storage)


def is_float(storage: str) -> bool:
    """Whether TVM computes floating point on this storage dtype."""
    return storage in ("float32", "float64", "float16", "bfloat16")


def is_signed(storage: str) -> bool:
    """Whether the dtype is a signed integer."""
    return storage.startswith("int")


def is_unsigned(storage: str) -> bool:
    """Whether the dtype is an unsigned integer."""
    return storage.startswith("uint")


def is_integer(storage: str) -> bool:
    """Whether the dtype is an integer (bool is not)."""
    return is_signed(storage) or is_unsigned(storage)


def bits(storage: str) -> int:
    """Width of one stored element in bits."""
    return 8 if storage == "bool" else numpy_dtype(storage).itemsize * 8
