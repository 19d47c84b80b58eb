"""Transformations as asks: which element a method wants on a space. Where it may go, the analysis decides."""

from qcompile.passes.asks.base import Ask, Context, Entry, Report, apply_asks
from qcompile.passes.asks.smooth import Smooth

__all__ = ["Ask", "Context", "Entry", "Report", "Smooth", "apply_asks"]
