"""Keys or values behind those that are in a cache already, without a copy of these.

    cache[b, h, T - S + s] = new[b, h, s],    s < S

``T`` positions are in the cache afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import StringImm
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.targets.target import Target


@dataclass(frozen=True)
class Append:
    """Parameters of the PrimFunc: ``cache (B, heads, C, width)`` float32, which it writes to; ``new (B, heads, S, width)``
    float32; and a tensor that nothing is read from but its shape, with the extent ``T`` along `axis`.

    Raises ``IndexError`` where it is called if ``S <= T <= C`` does not hold.

    Attributes:
        heads, width: of the cache.
        total_rank, axis, total_dtype: of the tensor that tells ``T``.
    """

    heads: int
    width: int
    total_rank: int = 2
    axis: int = 1
    total_dtype: str = "int64"

    @property
    def params(self) -> tuple[v.Param, ...]:
        """The buffers of the PrimFunc in order."""
        extents = tuple("T" if i == self.axis else f"E{i}" for i in range(self.total_rank))
        return (
            v.Param("cache", ("B", self.heads, "C", self.width)),
            v.Param("new", ("B", self.heads, "S", self.width)),
            v.Param("total", extents, self.total_dtype),
        )

    def build(self, target: Target, name: str = "append") -> Any:
        """Return the ``tirx.PrimFunc`` with global symbol ``name``."""
        with v.kernel(name, self.params) as (builder, names):
            total, room, length = names["T"], names["C"], names["S"]
            message = StringImm("a cache has no room for what is appended to it")
            fits = T.And(length <= total, total <= room)
            B.add_to_parent(tirx.AssertStmt(fits, StringImm("IndexError"), [message]))
            lanes = v.lanes_of(target)
            with T.serial(names["B"]) as b, T.serial(self.heads) as head, T.serial(length) as s:

                def copy(i: Any, n: int, _: int, b: Any = b, head: Any = head, s: Any = s) -> None:
                    value = v.load(names["new"], [b, head, s, i], n)
                    v.store(names["cache"], [b, head, total - length + s, i], value, n)

                v.sweep(self.width, lanes, copy)
        return builder.get()

    def reference(self, cache: np.ndarray, new: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
        """``{"cache": ...}`` in numpy."""
        filled, end = cache.copy(), total.shape[self.axis]
        filled[:, :, end - new.shape[2] : end] = new
        return {"cache": filled}
