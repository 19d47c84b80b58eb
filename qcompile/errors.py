"""Every error a user can cause. One class per kind, one message per case.

A message names the tensor, node or file it is about and says what to do next; the command line prints it
without a traceback and exits with the class's ``exit_code``. This module imports nothing, so all layers may use it.
"""

from __future__ import annotations


class QcompileError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class ModelError(QcompileError):
    """The model file or module is corrupt, incomplete or not acceptable (NaN weights, escaping paths ...)."""

    exit_code = 3


class UnsupportedOperatorError(ModelError):
    """An operator (or one of its attribute combinations) has no lowering."""

    exit_code = 4


class CalibrationError(QcompileError):
    """Calibration data are missing, empty or do not match the model's inputs."""

    exit_code = 5


class InputError(QcompileError):
    """Inputs given to a compiled program have the wrong name, shape or dtype."""

    exit_code = 6


class ArtifactError(QcompileError):
    """An artifact directory is incomplete, altered, or cannot be written."""

    exit_code = 7


class TargetError(QcompileError):
    """The target cannot execute what was asked for, or this machine cannot execute the artifact."""

    exit_code = 8


class FormatError(QcompileError, ValueError):
    """A number format cannot be parsed, or does not apply to the tensor it is asked for."""

    exit_code = 9


class RecipeError(QcompileError, ValueError):
    """A recipe is unknown or names steps or options that do not exist."""

    exit_code = 10


class ExtensionError(QcompileError):
    """A file or module of the user's own that was to be loaded is not there or fails."""

    exit_code = 11
