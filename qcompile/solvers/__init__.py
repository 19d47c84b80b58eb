"""Solvers: how the stored codes of one weight matrix are chosen."""

from qcompile.solvers.allocation import Allocation, Choice, allocate, equal_loss_bits
from qcompile.solvers.base import Solver, get_solver, list_solvers, output_error, register_solver
from qcompile.solvers.correction import correct_bias, correct_weight
from qcompile.solvers.gptq import Gptq
from qcompile.solvers.mse import LeastSquares
from qcompile.solvers.quantease import QuantEase
from qcompile.solvers.rtn import RoundToNearest

__all__ = [
    "Allocation",
    "Choice",
    "Gptq",
    "LeastSquares",
    "QuantEase",
    "RoundToNearest",
    "Solver",
    "allocate",
    "correct_bias",
    "correct_weight",
    "equal_loss_bits",
    "get_solver",
    "list_solvers",
    "output_error",
    "register_solver",
]
