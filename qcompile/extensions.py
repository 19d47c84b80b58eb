"""Formats, kernels, transforms and recipes of your own: Python files that register them when they are imported.

    qcompile --extension my_format.py compile MODEL --weight mine/g64 ...
    QCOMPILE_EXTENSIONS="my_format.py my_package.kernels" qcompile formats

From Python an import does the same. Loading an extension runs its code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

from qcompile.errors import ExtensionError, QcompileError


def load(place: str) -> ModuleType:
    """Import ``path/to/file.py`` or ``package.module``, once.

    Raises:
        ExtensionError: it is not there, or importing it fails.
    """
    try:
        return _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except QcompileError:
        raise
    except Exception as error:
        raise ExtensionError(f"{place} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    # A name of its own: two files of one name, or of the name of a package, do not get in each other's way.
    name = f"qcompile_extension_{path.stem}_{zlib.crc32(str(path.resolve()).encode())}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
