"""Solvers: how the stored codes of one weight matrix are chosen."""

from qcompile.solvers.base import Solver, get_solver, list_solvers, output_error, register_solver
from qcompile.solvers.correction import correct_bias, correct_weight
from qcompile.solvers.gptq import Gptq
from qcompile.solvers.mse import LeastSquares
from qcompile.solvers.quantease import QuantEase
from qcompile.solvers.rtn import RoundToNearest

__all__ = [
    "Gptq",
    "LeastSquares",
    "QuantEase",
    "RoundToNearest",
    "Solver",
    "correct_bias",
    "correct_weight",
    "get_solver",
    "list_solvers",
    "output_error",
    "register_solver",
]
