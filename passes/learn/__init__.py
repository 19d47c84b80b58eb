"""Transformations that are learned: elements with torch parameters, trained through the engine that folds them.

The classes here are asks like all others; torch is imported when one of them is applied.
"""

from qcompile.passes.learn.affinequant import AffineQuant
from qcompile.passes.learn.base import Learned
from qcompile.passes.learn.flatquant import FlatQuant
from qcompile.passes.learn.omniquant import OmniQuant
from qcompile.passes.learn.ostquant import OSTQuant
from qcompile.passes.learn.spinquant import SpinQuant

__all__ = ["AffineQuant", "FlatQuant", "Learned", "OSTQuant", "OmniQuant", "SpinQuant"]
