"""Folders of the user, by the XDG Base Directory Specification: ``$XDG_CACHE_HOME`` and ``$XDG_DATA_HOME``."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """What can be made again: downloads, compiled code."""
    return _folder("XDG_CACHE_HOME", ".cache")


def data() -> Path:
    """What the user has made: measurements."""
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "qcompile"
