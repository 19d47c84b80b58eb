"""Transformations as asks: which element a method wants on a space. Where it may go, the analysis decides."""

from qcompile.passes.asks.base import (
    Ask,
    Context,
    Data,
    Entry,
    Precision,
    Refusal,
    Report,
    Rewrite,
    apply_asks,
    register_ask,
    registered_asks,
)
from qcompile.passes.asks.centre import Centre
from qcompile.passes.asks.clip import ClipTokens
from qcompile.passes.asks.equalize import Equalize
from qcompile.passes.asks.online import RotateOnline
from qcompile.passes.asks.pairs import PairScale
from qcompile.passes.asks.permute import Permute
from qcompile.passes.asks.promote import PromoteClip, PromoteSiLU
from qcompile.passes.asks.rotate import Rotate, RotateKeys
from qcompile.passes.asks.scales import ColumnScale
from qcompile.passes.asks.shift import MoveBias, Noise, Reparametrize, Symmetrize
from qcompile.passes.asks.smooth import Awq, Smooth
from qcompile.passes.asks.split import SplitChannels

__all__ = [
    "Ask",
    "Awq",
    "Centre",
    "ClipTokens",
    "ColumnScale",
    "Context",
    "Data",
    "Entry",
    "Equalize",
    "MoveBias",
    "Noise",
    "PairScale",
    "Permute",
    "Precision",
    "PromoteClip",
    "PromoteSiLU",
    "Refusal",
    "Reparametrize",
    "Report",
    "Rewrite",
    "Rotate",
    "RotateKeys",
    "RotateOnline",
    "Smooth",
    "SplitChannels",
    "Symmetrize",
    "apply_asks",
    "register_ask",
    "registered_asks",
]
