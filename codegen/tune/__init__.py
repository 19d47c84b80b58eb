"""Tuning: measure the configs of the linear kernels on a machine, keep the best, and choose by what was measured.

`database` holds results and answers `codegen.kernels.select`; `search` decides what to try; `measure` runs kernels on this
machine, or on a board through TVM's RPC tracker.
"""

from qcompile.codegen.tune.database import Database, Measured, database_for
from qcompile.codegen.tune.search import Trial, tune, tune_all

__all__ = ["Database", "Measured", "Trial", "database_for", "tune", "tune_all"]
