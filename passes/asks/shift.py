"""Translations of activations, taken back in biases.

    Symmetrize   t_j = -(max x_j + min x_j) / 2           every channel lies around 0 (OutlierTune's symmetrization)
    Reparametrize  per-channel scale and zero point of a norm's output become one scale and zero point for all:
                 x'_j = (x_j - z_j) s / s_j               (RepQ-ViT, RepQuant)
    Noise        t_j fixed and random, spread over one step   the rounding error of clustered values evens out (NoisyQuant)
    MoveBias     t = -b of a value projection             attention rows sum to 1, so the bias ends in the output bias

Sources: Wang et al., "OutlierTune", 2024; Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization
of Vision Transformers", ICCV 2023; Liu et al., "NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization
for Vision Transformers", CVPR 2023.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.asks.base import Ask, Context, Entry, Refusal, Rewrite, Statistics
from qcompile.passes.spaces import Space, Spaces
from qcompile.passes.spaces.request import admits_diagonal, scale
from qcompile.passes.spaces.translate import Translator, Untranslatable


@dataclass(frozen=True)
class Shift(Rewrite):
    """Translate the input of every quantized linear operator.

    Attributes:
        insert: add biases where there are none.
        online: also add a vector at run time where the writer has none.
    """

    insert: bool = True
    online: bool = False

    @abstractmethod
    def amount(self, name: str, found: Statistics) -> np.ndarray:
        """The translation of one activation, per channel."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Translate what can be translated; the report names the operators in the way."""
        statistics = context.statistics()
        translator = Translator(context.spaces.rebase(model), insert=self.insert)
        done = 0
        for name in dict.fromkeys(r.activation for r in context.all_readers()):
            if name not in statistics:
                continue
            try:
                translator.translate(name, self.amount(name, statistics[name]), online=self.online)
                done += 1
            except Untranslatable as reason:
                context.report.entries.append(Entry(self.name, -1, False, f"{name}: {reason}"))
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} activations translated"))
        return done > 0


@dataclass(frozen=True)
class Symmetrize(Shift):
    """Move every channel to the middle of its range."""

    def amount(self, name: str, found: Statistics) -> np.ndarray:
        """Minus the middle."""
        return -(np.asarray(found.maximum, np.float64) + found.minimum) / 2


@dataclass(frozen=True)
class Noise(Shift):
    """Add fixed uniform noise of one quantization step.

    Attributes:
        bits: of the activation's format.
        seed: of the noise.
    """

    bits: int = 6
    seed: int = 0

    def amount(self, name: str, found: Statistics) -> np.ndarray:
        """Uniform in half a step around 0."""
        step = float(np.max(found.absmax)) / (2 ** (self.bits - 1) - 1)
        rng = np.random.default_rng([self.seed, len(name), sum(name.encode())])
        return rng.uniform(-step / 2, step / 2, len(found.absmax))


@dataclass(frozen=True)
class Reparametrize(Ask):
    """Per-channel scale and zero point of activations become one of each for the whole tensor.

    Attributes:
        bits: of the activation's format.
        insert: add biases where there are none.
    """

    bits: int = 8
    insert: bool = True

    def apply(self, context: Context) -> Spaces:
        """Translate and scale the spaces that admit both."""
        statistics = context.statistics()
        spaces = context.spaces
        model = spaces.model.clone()
        translator = Translator(spaces.rebase(model), insert=self.insert)
        element = spaces.identity()
        inserted = False
        for space in spaces:
            readers = context.readers(space)
            if not readers or not admits_diagonal(space):
                continue
            try:
                low, high = _limits(space, readers, statistics)
                for name in dict.fromkeys(r.activation for r in readers):
                    channels = next(r.channels for r in readers if r.activation == name)
                    inserted |= translator.translate(name, -((low + high) / 2)[channels])
            except (Untranslatable, Refusal) as reason:
                context.report.entries.append(Entry(self.name, space.index, False, str(reason)))
                continue
            width = np.where(high > low, high - low, 1.0)
            scale(spaces, element, space, np.exp(np.log(width).mean()) / width)
            context.report.entries.append(Entry(self.name, space.index, True, f"widths {width.min():.3g} .. {width.max():.3g}"))
        from qcompile.passes.spaces import analyse, fold

        folded = fold(spaces.rebase(model), element)
        return analyse(folded) if inserted else spaces.rebase(folded)


def _limits(space: Space, readers, statistics) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(space.size, np.inf), np.full(space.size, -np.inf)
    for reader in readers:
        found = statistics.get(reader.activation)
        if found is None or (reader.channels < 0).any():
            raise Refusal("no statistics of all its readers")
        np.minimum.at(low, reader.channels, np.asarray(found.minimum, np.float64))
        np.maximum.at(high, reader.channels, np.asarray(found.maximum, np.float64))
    return low, high


@dataclass(frozen=True)
class MoveBias(Rewrite):
    """Move the bias of value projections through the attention into the bias of the output projection."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Translate every biased input of an attention's values by minus its bias."""
        translator = Translator(context.spaces.rebase(model), insert=True)
        done = 0
        for node in list(model.graph):
            if node.op_type != "Attention" or node.inputs[2] is None:
                continue
            value, writer = node.inputs[2], node.inputs[2].producer()
            while writer is not None and writer.op_type in ("Transpose", "Reshape", "Expand", "Unsqueeze"):
                value, writer = writer.inputs[0], writer.inputs[0].producer()
            bias = next((v for v in writer.inputs if v is not None and v.is_initializer()), None) if writer else None
            if writer is None or writer.op_type != "Add" or bias is None or bias.const_value is None:
                continue
            try:
                translator.translate(value.name, -bias.const_value.numpy().astype(np.float64).reshape(-1))
                done += 1
            except Untranslatable as reason:
                context.report.entries.append(Entry(self.name, -1, False, f"{value.name}: {reason}"))
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} biases moved"))
        return done > 0
