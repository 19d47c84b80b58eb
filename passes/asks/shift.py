"""Translations of activations, taken back in biases.

    Symmetrize   t_j = -(max x_j + min x_j) / 2           every channel lies around 0 (OutlierTune's symmetrization,
                                                          OmniQuant's shift)
    Reparametrize  per-channel scale and zero point of an activation become one of each for the whole tensor:
                 x'_j = (x_j - z_j) s / s_j               (RepQ-ViT, RepQuant; OutlierTune with its symmetrization)
    Noise        t_j fixed and random, spread over one step   the rounding error of clustered values evens out (NoisyQuant)
    MoveBias     t = -b of a value projection             attention rows sum to 1, so the bias ends in the output bias

Sources: Wang et al., "OutlierTune", 2024; Shao et al., "OmniQuant", ICLR 2024; Li et al., "RepQ-ViT: Scale
Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023; Liu et al., "NoisyQuant: Noisy
Bias-Enhanced Post-Training Activation Quantization for Vision Transformers", CVPR 2023.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.asks.base import Ask, Context, Entry, Rewrite, Statistics, register_ask
from qcompile.passes.asks.scales import ColumnScale
from qcompile.passes.spaces import Spaces
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


@register_ask("symmetrize")
@dataclass(frozen=True)
class Symmetrize(Shift):
    """Moves every channel to the middle of its range; biases take it back."""

    def amount(self, name: str, found: Statistics) -> np.ndarray:
        """Minus the middle."""
        return -(np.asarray(found.maximum, np.float64) + found.minimum) / 2


@register_ask("noise")
@dataclass(frozen=True)
class Noise(Shift):
    """Adds fixed uniform noise of one quantization step (NoisyQuant); biases take it back.

    Attributes:
        bits: of the activation's format.
        seed: of the noise.
    """

    bits: int = 6
    seed: int = 0

    def amount(self, name: str, found: Statistics) -> np.ndarray:
        """Uniform in half a step around 0."""
        step = float(np.max(found.absmax)) / (2 ** (self.bits - 1) - 1)
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return rng.uniform(-step / 2, step / 2, len(found.absmax))


@register_ask("reparametrize")
@dataclass(frozen=True)
class Reparametrize(Ask):
    """Turns per-channel scales and zero points of activations into one of each for the whole tensor (RepQ-ViT).

    Attributes:
        insert: add biases where there are none.
    """

    insert: bool = True

    def apply(self, context: Context) -> Spaces:
        """Shift to the middle, then divide by the half width, wherever each is possible."""
        shifted = Symmetrize(self.insert).apply(context)
        again = Context(shifted, context.data, context.quantized, context.report)
        return ColumnScale(share=1.0).apply(again)


@register_ask("move-bias")
@dataclass(frozen=True)
class MoveBias(Rewrite):
    """Moves the bias of value projections through the attention into the bias of the output projection."""

    def rewrite(self, model: ir.Model, context: Context) -> bool:
        """Translate the values of every attention by minus the bias they were written with."""
        translator = Translator(context.spaces.rebase(model), insert=True)
        done = 0
        for node in list(model.graph):
            value = node.inputs[2] if node.op_type == "Attention" and len(node.inputs) > 2 else None
            if value is None:
                continue
            try:
                bias = translator.bias_of(value)
                if bias is not None and bias.any():
                    translator.translate(value.name or "", -bias)
                    done += 1
            except Untranslatable as reason:
                context.report.entries.append(Entry(self.name, -1, False, f"{value.name}: {reason}"))
        context.report.entries.append(Entry(self.name, -1, done > 0, f"{done} biases moved"))
        return done > 0
