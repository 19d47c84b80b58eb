"""Softmax attention over float32 heads, without ever writing the score matrix to memory.

    o[b, i, h] = sum_j p_ij v[b, j, h'] / sum_j p_ij,   p_ij = exp(scale q[b, i, h] . k[b, j, h'] + mask_ij - m_i)

with ``h' = h // (heads / kv_heads)``. ``m_i`` is any number near the largest score, here the
largest so far. Exponentials are taken to the base 2, with ``log2 e`` folded into the scale.

Many queries are computed in blocks (`attention_blocked`), a single one, as when a text is continued token by token,
by reading K and V once as they lie (`attention_single`).

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention:
Fast and Memory-Efficient Exact Attention with IO-Awareness" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.attention_blocked import BlockedAttention
from qcompile.codegen.kernels.cpu.attention_parts import LOWEST
from qcompile.codegen.kernels.cpu.attention_single import SingleQueryAttention
from qcompile.errors import TargetError
from qcompile.targets.target import Target


@dataclass(frozen=True)
class Attention:
    """Multi-head or grouped-query attention; any batch size and any lengths at run time.

    Parameters of the PrimFunc, float32 unless said; ``H`` heads, ``KH`` key/value heads, ``D`` = head_dim, ``DV`` =
    value_dim, query length ``S``, key length ``T``:

    * ``qkv (B, S, (H + KH) D + KH DV)`` = [q | k | v] if `layout` is "merged" (then ``T = S``); or
      ``q (B, S, H D), k (B, T, KH D), v (B, T, KH DV)`` if it is "rows"; or
      ``q (B, H, S, D), k (B, KH, T, D), v (B, KH, T, DV)`` if it is "heads"; or the same with room for more keys than
      there are, ``k (B, KH, C, D), v (B, KH, C, DV)`` with ``C >= T``, if it is "cache" (``T`` is that of the mask);
    * ``mask (B or 1, H or 1, S or 1, T)`` if `mask` is "float" (added to the scaled scores) or "bool" (True = visible;
      dtype bool), or ``mask (B, T)`` if it is "keys" (not 0 = visible; dtype `keys_dtype`);
    * the output ``o (B, S, H DV)``.

    A query all of whose keys are masked alike, be it with -inf, the lowest float or False, attends to all of them
    uniformly. A query that precedes all keys of a causal attention (``T < S``) gives 0.

    Attributes:
        scale: factor of the scores; ``1 / sqrt(head_dim)`` if None.
        mask_axes: which of the batch, head and query axes of a 4-D mask are full; the others have extent 1.
        causal: ``""``; ``"upper_left"`` (key ``j`` visible to query ``i`` if ``j <= i``, as ONNX has it without a
            cache); or ``"lower_right"`` (``j <= i + T - S``, queries continue a sequence).
    """

    heads: int
    head_dim: int
    kv_heads: int = 0
    value_dim: int = 0
    scale: float | None = None
    layout: str = "merged"
    mask: str = ""
    mask_axes: tuple[bool, bool, bool] = (True, False, False)
    keys_dtype: str = "int64"
    causal: str = ""

    def __post_init__(self) -> None:
        problem = ""
        if self.heads < 1 or self.head_dim < 1 or self.heads % self.kh:
            problem = f"{self.heads} heads of {self.head_dim} with {self.kh} key/value heads"
        elif self.layout not in ("merged", "rows", "heads", "cache"):
            problem = f"unknown layout {self.layout!r}"
        elif self.layout == "cache" and not self.mask:
            problem = "a cache needs a mask, which tells how many keys there are"
        elif self.mask not in ("", "float", "bool", "keys"):
            problem = f"unknown mask {self.mask!r}"
        elif self.causal not in ("", "upper_left", "lower_right"):
            problem = f"unknown causal alignment {self.causal!r}"
        if problem:
            raise TargetError(f"attention kernel: {problem}")

    @property
    def kh(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def dv(self) -> int:
        """Width of a value head."""
        return self.value_dim or self.head_dim

    @property
    def params(self) -> tuple[v.Param, ...]:
        """The buffers of the PrimFunc in order."""
        h, kh, d, dv = self.heads, self.kh, self.head_dim, self.dv
        if self.layout == "merged":
            inputs = [v.Param("qkv", ("B", "S", (h + kh) * d + kh * dv))]
        elif self.layout == "rows":
            inputs = [
                v.Param("q", ("B", "S", h * d)),
                v.Param("k", ("B", "T", kh * d)),
                v.Param("v", ("B", "T", kh * dv)),
            ]
        else:
            rows = "C" if self.layout == "cache" else "T"
            inputs = [
                v.Param("q", ("B", h, "S", d)),
                v.Param("k", ("B", kh, rows, d)),
                v.Param("v", ("B", kh, rows, dv)),
            ]
        length = "S" if self.layout == "merged" else "T"
        if self.mask == "keys":
            inputs.append(v.Param("mask", ("B", length), self.keys_dtype))
        elif self.mask:
            extents = tuple(e if full else 1 for e, full in zip(("B", h, "S"), self.mask_axes))
            inputs.append(v.Param("mask", (*extents, length), "bool" if self.mask == "bool" else "float32"))
        return (*inputs, v.Param("o", ("B", "S", h * dv), output=True))

    def build(self, target: Target, name: str = "attention") -> Any:
        """Return the ``tirx.PrimFunc`` with global symbol ``name``."""
        with v.kernel(name, self.params) as (builder, names):
            blocked = BlockedAttention(self, target, names)
            if self.layout == "merged":
                blocked.emit()
            else:
                with T.If(names["S"] == 1):
                    with T.Then():
                        SingleQueryAttention(self, target, names).emit()
                    with T.Else():
                        blocked.emit()
        return builder.get()

    def reference(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """``{"o": ...}`` in float64 numpy."""
        mask = inputs[-1]  # if there is one
        h, kh, d, dv = self.heads, self.kh, self.head_dim, self.dv
        if self.layout == "merged":
            q, k, val = np.split(inputs[0], [h * d, (h + kh) * d], axis=2)
        else:
            q, k, val = inputs[:3]
        if self.layout == "cache":
            k, val = k[:, :, : mask.shape[-1]], val[:, :, : mask.shape[-1]]
        elif self.layout != "heads":
            q, k, val = (a.reshape(*a.shape[:2], -1, w).transpose(0, 2, 1, 3) for a, w in ((q, d), (k, d), (val, dv)))
        k, val = (np.repeat(a, h // kh, 1).astype(np.float64) for a in (k, val))
        s, t = q.shape[2], k.shape[2]
        scores = q.astype(np.float64) @ k.swapaxes(2, 3) * self.scale_value
        if self.mask == "float":
            scores = scores + np.maximum(mask, LOWEST / 1.5)
        elif self.mask:
            visible = mask[:, None, None, :] != 0 if self.mask == "keys" else mask
            scores = np.where(visible, scores, LOWEST)
        scores = np.where(scores < LOWEST / 2, LOWEST, scores)
        limit = np.arange(s) + (t - s if self.causal == "lower_right" else 0)
        hidden = (np.arange(t) > limit[:, None]) if self.causal else np.zeros((s, t), bool)
        scores = np.where(hidden, -np.inf, scores)
        p = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), LOWEST))
        total = p.sum(-1, keepdims=True)
        o = p @ val / np.where(total == 0, 1, total)
        return {"o": o.transpose(0, 2, 1, 3).reshape(len(o), s, h * dv).astype(np.float32)}

    @property
    def scale_value(self) -> float:
        """The factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale
