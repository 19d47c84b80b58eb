"""Channel spaces: where a transformation may be folded into a model, found by analysis of its graph."""

from qcompile.passes.spaces.analysis import Spaces, analyse
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.fold import fold
from qcompile.passes.spaces.prove import Proof, prove
from qcompile.passes.spaces.space import Member, Reader, Space

__all__ = ["Element", "Member", "Proof", "Reader", "Space", "Spaces", "analyse", "fold", "prove"]
