"""The data of a report. Nothing here depends on the time or the machine, so that artifacts are reproducible."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LayerRecord:
    """One quantized site.

    Attributes:
        name: where the weight came from.
        kind: ``linear``, ``convolution`` or ``embedding``.
        shape: ``(K, N)``, or ``(V, D)`` for an embedding.
        weight_format, activation_format, solver: what it was quantized to, and how.
        bits_per_weight: stored bits, scales included.
        weight_error: relative Frobenius error of the weight.
        output_error: relative error of the layer's output on calibration data (weights alone), or None without data.
        before, after: absolute maximum per input channel of the activation, before and after the transforms.
        kernel, kernel_reason: which kernel runs it and why.
        refused: kernel families that do not run it, with their reasons.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    weight_format: str
    activation_format: str = "none"
    solver: str = ""
    bits_per_weight: float = 32.0
    weight_error: float = 0.0
    output_error: float | None = None
    before: list[float] | None = None
    after: list[float] | None = None
    kernel: str = ""
    kernel_reason: str = ""
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Refusal:
    """Something that was not done, and why."""

    what: str
    where: str
    reason: str


@dataclass
class Report:
    """Everything a compile has to say.

    Attributes:
        model: source name.
        target, recipe: names.
        layers: one record per quantized site.
        transforms: what each transform did.
        proof: relative error, in float32 on one sample, of a random element of all channel spaces ("analysis") and of
            the transforms that were applied ("transforms").
        float_weights: how many weights stay float32.
        refusals: what was left undone, with reasons.
        quality: measured error of the compiled program against the float model.
        size: bytes by file of the artifact.
        recognised: composites found in the graph, by operator.
        kernels: number of uses by kernel.
        tensors: packed bytes by tensor.
        hardware: for hardware targets, every node with its widths, folding, cycles and area.
    """

    model: str
    target: str
    recipe: str
    layers: list[LayerRecord] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    proof: dict[str, float] = field(default_factory=dict)
    float_weights: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    recognised: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)

    def refuse(self, what: str, where: str, reason: str) -> None:
        """Record something left undone; the same thing is recorded once."""
        refusal = Refusal(what, where, reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over all weights, those that stay float among them."""
        weights = self.float_weights + sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        bits = 32.0 * self.float_weights
        bits += sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return bits / weights if weights else 32.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; channel ranges are left to the plots."""
        content = dataclasses.asdict(self)
        for layer in content["layers"]:
            del layer["before"], layer["after"]
        return {**content, "bits_per_weight": self.bits_per_weight}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """Inverse of `to_dict`, but for the channel ranges."""
        fields = {f.name for f in dataclasses.fields(cls)}
        known = {key: value for key, value in content.items() if key in fields}
        known["layers"] = [LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
        known["refusals"] = [Refusal(**refusal) for refusal in content["refusals"]]
        return cls(**known)
