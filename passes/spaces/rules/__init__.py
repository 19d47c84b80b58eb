"""The rule table: one row per operator, grouped by kind. Importing this package fills ``RULES``."""

from qcompile.passes.spaces.rules import (
    attention,
    contraction,
    elementwise,
    indexing,
    normalisation,
    quantization,
    structure,
)
from qcompile.passes.spaces.rules.registry import RULES, Rule, rule

__all__ = [
    "RULES",
    "Rule",
    "attention",
    "contraction",
    "elementwise",
    "indexing",
    "normalisation",
    "quantization",
    "rule",
    "structure",
]
