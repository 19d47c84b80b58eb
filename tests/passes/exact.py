"""Asks on miniatures in float64: constants are widened first, so that a wrong rewrite cannot hide behind rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import miniatures
import numpy as np
import onnx_ir as ir

from qcompile.passes.asks import Ask, Data, Report, apply_asks
from qcompile.passes.execute import run
from qcompile.passes.recognise import recognise
from qcompile.passes.spaces import Spaces, analyse
from qcompile.passes.spaces.prove import random_inputs


class Statistics:
    """Ranges and moments of rows."""

    def __init__(self, rows: np.ndarray, moments: bool) -> None:
        self.absmax, self.minimum, self.maximum = np.abs(rows).max(0), rows.min(0), rows.max(0)
        self.mean = rows.mean(0)
        self.hessian = rows.T @ rows / len(rows) if moments else None


def widen(model: ir.Model) -> ir.Model:
    """All float constants as float64, declared so."""
    model = model.clone()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64), name=value.name)
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    return model


@dataclass
class Case:
    """One model with inputs, which are the calibration data too."""

    model: ir.Model
    feeds: dict = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, recognised: bool = False) -> Case:
        """A miniature, as exported or with its composites recognised."""
        model = miniatures.model(name)
        model = widen(recognise(model)[0] if recognised else model)
        return cls(model, random_inputs(model, np.random.default_rng(0)))

    @cached_property
    def spaces(self) -> Spaces:
        return analyse(self.model)

    @cached_property
    def exact(self) -> dict:
        return run(self.spaces.model, self.feeds)

    @property
    def data(self) -> Data:
        return Data(
            lambda model, names, moments: {n: Statistics(x, moments) for n, x in self.rows(model, names).items()},
            [self.feeds],
            self.rows,
        )

    def rows(self, model: ir.Model, names: Sequence[str], count: int = 0) -> dict[str, np.ndarray]:
        found = run(model, self.feeds, list(names))
        return {n: found[n].numpy().reshape(-1, found[n].shape[-1]) for n in names}

    def apply(self, *asks: Ask, quantized=None) -> tuple[ir.Model, Report]:
        """Apply asks and check that the function stayed."""
        model, report = apply_asks(None, self.spaces, asks, self.data, quantized)
        error = self.error(model)
        assert error <= 1e-10, f"relative error {error:.1e}"
        return model, report

    def error(self, model: ir.Model) -> float:
        """Largest difference of an output, relative to its largest entry."""
        after = run(model, self.feeds)
        return max(float((a - after[n]).abs().max() / a.abs().max()) for n, a in self.exact.items())
