"""A transformation written from scratch: reflect the loudest direction of the activations onto all channels alike.

    v = first eigenvector of E[x x^T],   u = (1, ..., 1) / sqrt(n),   Q = 1 - 2 w w^T / w^T w  with  w = v - u

A massive activation lies along v; after the reflection all channels share it. Use it by naming this file:

    qcompile compile MODEL --recipe reflect.toml        # transforms = [{ name = "reflect.py:Reflect" }]
    qcompile.compile(model, transforms=[Reflect()])
"""

from dataclasses import dataclass

import numpy as np

from qcompile.passes.asks import Ask, Context, Refusal
from qcompile.passes.asks.rotate import reaches_quantized, second_moment
from qcompile.passes.spaces import Element, Space
from qcompile.passes.spaces.groups import Limit
from qcompile.passes.spaces.request import mix


@dataclass(frozen=True)
class Reflect(Ask):
    """Reflects the loudest direction of every space that rotates as a whole onto the ones vector."""

    least: float = 0.2  # share of the energy below which a direction is not worth it

    def propose(self, space: Space, context: Context, element: Element) -> str | None:
        """The analysis says that the space rotates; which rotation is up to us."""
        if not space.mixes or space.limit & Limit.PLANE or not reaches_quantized(space, context):
            return None
        if space.limit & Limit.FIX_ONES:
            raise Refusal("a LayerNorm keeps the ones vector; choose centre first")
        moment, shares = second_moment(space, context), []
        for cell in np.unique(space.cells):
            inside = np.flatnonzero(space.cells == cell)
            values, vectors = np.linalg.eigh(moment[np.ix_(inside, inside)])
            shares.append(values[-1] / values.sum())
            w = vectors[:, -1] - 1 / np.sqrt(len(inside))
            if shares[-1] > self.least and w @ w > 1e-12:
                mix(context.spaces, element, space, cell, np.eye(len(inside)) - 2 * np.outer(w, w) / (w @ w))
        return f"loudest direction holds {max(shares):.0%} of the energy" if max(shares) > self.least else None
