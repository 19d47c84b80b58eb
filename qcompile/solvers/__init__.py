"""Solvers: how the stored codes of one weight matrix are chosen."""

from qcompile.solvers.base import Solver, get_solver, list_solvers, output_error, register_solver
from qcompile.solvers.gptq import Gptq
from qcompile.solvers.mse import LeastSquares
from qcompile.solvers.rtn import RoundToNearest

__all__ = [
    "Gptq",
    "LeastSquares",
    "RoundToNearest",
    "Solver",
    "get_solver",
    "list_solvers",
    "output_error",
    "register_solver",
]
