"""The result of capture: a model in memory and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass
class Captured:
    """A float model as the rest of the compiler takes it.

    Attributes:
        model: the graph; opset of the default domain at least 18, weights named as in the checkpoint and, where they
            come from files, memory-mapped.
        source: what was captured, in values that JSON can hold: ``kind``, ``path``, ``files`` (name -> sha256),
            ``architecture``, ``parity`` (what the comparison with the original measured) and so on.
        tokenizer: the ``tokenizer.json`` that belongs to the model, if there is one.
        example_inputs: one set of inputs the model accepts, by input name; None for an ONNX file without any.
        task: ``"text-generation"``, ``"features"``, ``"classification"``, ``"image-features"`` ... or None if unknown.
    """

    model: ir.Model
    source: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    example_inputs: dict[str, np.ndarray] | None = None
    task: str | None = None

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        return [value.name or "" for value in self.model.graph.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        return [value.name or "" for value in self.model.graph.outputs]
