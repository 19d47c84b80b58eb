"""The artifact: a directory with everything a compiled model needs, complete or not there at all.

    manifest.json         schema version, sha256 of every file, what was compiled from what, recipe, tool versions
    lib/model.so          the program (virtual machine code and kernels)
    weights.safetensors   packed weights, memory-mapped at load
    model.onnx            the quantized model, for ONNX Runtime; its weights are the same bytes
    report.html           what was done, what was refused and why

It is written under a temporary name beside its final place and renamed when complete. Loading checks every hash
and refuses names that leave the directory. The same input, recipe and versions give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qcompile.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def staged(destination: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder that becomes ``destination`` when the block ends without an error.

    An error, Ctrl-C or SIGTERM removes the folder; a kill leaves only a hidden ``.NAME.tmp-PID`` that the next compile
    into the same place removes.

    Raises:
        ArtifactError: the destination exists and is not to be overwritten, or the disk refuses.
    """
    final = Path(destination).absolute()
    check_destination(final, overwrite=overwrite)
    parent = final.parent
    temporary = parent / f".{final.name}.tmp-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f".{final.name}.tmp-*"):
            if not _alive(stale.name.rpartition("-")[2]):
                shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        with _terminate_as_interrupt():
            yield temporary
            _publish(temporary, final)
    except OSError as error:
        raise ArtifactError(f"cannot write {error.filename or final}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_destination(final: Path, *, overwrite: bool = False) -> None:
    """Fail early if an artifact cannot be placed at ``final``.

    Raises:
        ArtifactError: it exists (and ``overwrite`` is False, or it is not an artifact), or cannot be written.
    """
    if final.exists():
        if not final.is_dir() or not ((final / MANIFEST).is_file() or not any(final.iterdir())):
            raise ArtifactError(f"{final} exists and is not an artifact; it is not overwritten, choose another folder")
        if not overwrite:
            raise ArtifactError(
                f"{final} exists; choose another folder, or say `overwrite=True` (`--force`) to replace it"
            )
    nearest = final.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ArtifactError(f"{nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ArtifactError(f"{nearest} is not writable")


def _publish(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
        return
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Hash every file in ``folder`` and write the manifest last."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=1, sort_keys=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Artifact:
    """A verified artifact directory."""

    path: Path
    manifest: dict[str, Any]

    def file(self, name: str) -> Path:
        """Path of a listed file.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.path} has no {name}")
        return self.path / name

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest included."""
        return sum(f["bytes"] for f in self.manifest["files"].values()) + (self.path / MANIFEST).stat().st_size


def open_artifact(path: str | os.PathLike[str], *, verify: bool = True) -> Artifact:
    """Read and check an artifact directory.

    Raises:
        ArtifactError: it is not one, was altered, is incomplete, or names files outside itself.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{manifest_path} is not readable: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{manifest_path} is not a manifest")
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(f"{folder} has schema {manifest.get('schema')}, this version reads {SCHEMA}; compile again")
    root = folder.resolve()
    for name, entry in manifest["files"].items():
        pure = PurePosixPath(name)
        target = folder / name
        if pure.is_absolute() or ".." in pure.parts or not target.resolve().is_relative_to(root):
            raise ArtifactError(f"{manifest_path} names {name!r}, which lies outside the artifact")
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            raise ArtifactError(f"{manifest_path}: the entry of {name!r} is not valid")
        if not target.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing")
        if target.stat().st_size != entry["bytes"] or (verify and sha256(target) != entry["sha256"]):
            raise ArtifactError(f"{target} does not match the manifest: the artifact was altered or is damaged")
    return Artifact(folder, manifest)
