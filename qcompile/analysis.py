"""The channel spaces of a model as an API: where transformations fold into it, and the proof.

>>> found = qcompile.spaces("path/to/model")
>>> print(found)                       # one block per space: size, group, members, reasons, costs
>>> found[3].group, found[3].members
>>> found.prove().error                # a random element of all groups at once, folded in float64
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.errors import ModelError
from qcompile.passes.spaces import Element, Spaces, analyse, fold
from qcompile.passes.spaces.prove import random_inputs

FLOAT32_TOLERANCE = 1e-3
"""Relative error up to which float32 rounding explains a difference; a wrong rule makes one of the order of 1."""


def spaces(model: Any, **capture_options: Any) -> Spaces:
    """Find the channel spaces of a model.

    Args:
        model: anything `qcompile.compile` takes.
        **capture_options: passed on to capture (``example_inputs``, ``dynamic``, ``task``, ``kv_cache`` ...).

    Returns:
        The analysis: iterate over it, print it, ``prove()`` it, or fold elements into it.

    Raises:
        ModelError: the model cannot be captured.
    """
    from qcompile.capture import capture
    from qcompile.passes.recognise import recognise

    graph, _ = recognise(capture(model, **capture_options).model)
    return analyse(graph)


def check(found: Spaces, feed: Mapping[str, np.ndarray], seed: int = 0) -> float:
    """Fold a random element of all groups and compare outputs on one sample, in float32 in ONNX Runtime.

    Returns:
        The largest difference of an output, relative to its largest entry.

    Raises:
        ModelError: it is too large; the analysis is wrong about this model.
    """
    element = Element.random(found.solution, np.random.default_rng(seed))
    error = difference(found.model, fold(found, element), feed)
    if not error <= FLOAT32_TOLERANCE:
        raise ModelError(
            f"the analysis of channel spaces fails its proof on this model (relative error {error:.1e}); "
            "`qcompile spaces MODEL --prove --each` names the space, `prove=False` (`--no-proof`) compiles anyway"
        )
    return error


def random_sample(model: ir.Model) -> dict[str, np.ndarray]:
    """Random inputs of the types that the model takes."""
    types = {v.name: v.dtype.numpy() for v in model.graph.inputs if v.dtype is not None}
    return {name: array.astype(types[name]) for name, array in random_inputs(model, np.random.default_rng(0)).items()}


def difference(before: ir.Model, after: ir.Model, feed: Mapping[str, np.ndarray]) -> float:
    """Largest difference of an output on one sample, relative to the output's largest entry."""
    one, other = (ort.run(ort.session(m), feed) for m in (before, after))
    worst = 0.0
    for name, a in one.items():
        if a.dtype.kind == "f" and a.size and (finite := np.isfinite(a)).any():
            error = np.abs(np.where(finite, a, 0) - np.where(finite, other[name], 0)).max()
            worst = max(worst, float(error) / (float(np.abs(a[finite]).max()) or 1.0))
    return worst
