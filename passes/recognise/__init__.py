"""Raise decomposed graphs to composites and linear operators to one form. See `recognise`."""

from qcompile.passes.recognise.driver import recognise
from qcompile.passes.recognise.result import Found, Recognised, Refused

__all__ = ["Found", "Recognised", "Refused", "recognise"]
