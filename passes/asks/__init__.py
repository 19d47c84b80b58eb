"""Transformations as asks: which element a method wants on a space. Where it may go, the analysis decides."""

from qcompile.passes.asks.base import Ask, Context, Data, Entry, Refusal, Report, Rewrite, apply_asks
from qcompile.passes.asks.online import RotateOnline
from qcompile.passes.asks.rotate import Rotate
from qcompile.passes.asks.smooth import Smooth

__all__ = [
    "Ask",
    "Context",
    "Data",
    "Entry",
    "Refusal",
    "Report",
    "Rewrite",
    "Rotate",
    "RotateOnline",
    "Smooth",
    "apply_asks",
]
