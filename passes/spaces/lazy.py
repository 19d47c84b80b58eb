"""Constants that are computed when they are read, and kept only as long as there is room.

Folding touches one tensor at a time, so a model larger than memory can be folded. What was computed last is kept up to
`BUDGET` bytes in all, because a compile reads the same weights several times.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

BUDGET = 1 << 28
"""Bytes of computed tensors that are kept."""


class _Kept:
    """The tensors computed last, oldest first."""

    def __init__(self) -> None:
        self.tensors: OrderedDict[int, ir.TensorProtocol] = OrderedDict()
        self.size = 0

    def get(self, key: int) -> ir.TensorProtocol | None:
        """A kept tensor, which becomes the newest."""
        if key in self.tensors:
            self.tensors.move_to_end(key)
        return self.tensors.get(key)

    def put(self, key: int, tensor: ir.TensorProtocol) -> None:
        """Keep a tensor, at the cost of the oldest ones."""
        if tensor.nbytes > BUDGET:
            return
        self.tensors[key] = tensor
        self.size += tensor.nbytes
        while self.size > BUDGET:
            self.size -= self.tensors.popitem(last=False)[1].nbytes

    def drop(self, key: int) -> None:
        """Forget a tensor that nobody can read any more."""
        tensor = self.tensors.pop(key, None)
        self.size -= tensor.nbytes if tensor is not None else 0


_kept = _Kept()
_count = 0


def computed(
    function: Callable[[], np.ndarray], like: ir.TensorProtocol, shape: Sequence[int] | None = None
) -> ir.LazyTensor:
    """A tensor of the type, name and (unless given) shape of ``like`` whose values ``function`` returns in any float type."""
    global _count
    _count += 1
    key, dtype, name = _count, like.dtype, like.name

    def evaluate() -> ir.TensorProtocol:
        tensor = _kept.get(key)
        if tensor is None:
            tensor = ir.Tensor(np.ascontiguousarray(function()).astype(dtype.numpy()), dtype=dtype, name=name)
            _kept.put(key, tensor)
        return tensor

    weakref.finalize(evaluate, _kept.drop, key)
    dims = list(like.shape) if shape is None else list(shape)
    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(dims), name=name, cache=False)  # type: ignore[arg-type]
