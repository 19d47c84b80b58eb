"""Where measured kernel configs are kept: files that ship with the package, and files of the user.

`qcompile tune` writes to a folder of the user, ``~/.local/share/qcompile/tuned`` unless ``$XDG_DATA_HOME`` says otherwise, one
JSON file per target. A compile reads it before the file that ships. The environment variable QCOMPILE_TUNED names one file to use in place of both.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qcompile.errors import ArtifactError
from qcompile.targets import folders
from qcompile.targets.target import Target

VARIABLE = "QCOMPILE_TUNED"

SHIPPED = Path(__file__).parent / "tuned"


def name_of(target: Target) -> str:
    """What the files of a target are called, without the suffix."""
    if target.kind == "cuda":
        return "cuda"  # all architectures in one file
    return f"{target.cpu}{''.join(target.attributes)}" or target.kind


def named_by_variable() -> Path | None:
    """The file QCOMPILE_TUNED names, whether or not it is there; None where the variable is not set."""
    name = os.environ.get(VARIABLE)
    return Path(name).expanduser() if name else None


def of_user(name: str) -> Path:
    """The user's file called ``name``, whether or not it is there."""
    return folders.data() / "tuned" / f"{name}.json"


def shipped(name: str) -> Path:
    """The file called ``name`` that ships with the package, whether or not it is there."""
    return SHIPPED / f"{name}.json"


def to_write(target: Target) -> Path:
    """The file results for ``target`` are written to, where none is named."""
    return named_by_variable() or of_user(name_of(target))


def check_writable(path: Path) -> None:
    """Make the folder of a database, before anything is measured for it.

    Raises:
        ArtifactError: files cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        reason = "it is a folder" if path.is_dir() else ""
    except FileExistsError:
        reason = f"{path.parent} is no folder"
    except OSError as error:
        reason = f"{path.parent}: {error.strerror}"
    if reason:
        raise ArtifactError(
            f"the database {path} cannot be written ({reason}). Name a file elsewhere with `--database` or {VARIABLE}"
        )
