"""A compiled model: the artifact on disk and its program in memory."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile import artifact as artifacts
from qcompile.backends import Runner, get_backend
from qcompile.errors import ArtifactError
from qcompile.report import Report
from qcompile.runtime import TensorSpec

if TYPE_CHECKING:
    from qcompile.generation import Generation


class CompiledModel:
    """An artifact, loaded on first use. Call it with numpy arrays or torch tensors, by position or by name."""

    def __init__(self, artifact: artifacts.Artifact) -> None:
        self._artifact = artifact
        self._program: Runner | None = None
        self._report: Report | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; see `qcompile.runtime.Program`."""
        return self.program(*args, **kwargs)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name."""
        return self.program.run(feeds)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a text with a decoder that has a cache; see `qcompile.generation.generate`."""
        from qcompile.generation import generate

        return generate(self, prompt, **options)

    @property
    def program(self) -> Runner:
        """The loaded program.

        Raises:
            TargetError: it was compiled for another kind of machine.
        """
        if self._program is None:
            self._program = load_program(self.path, self._artifact.manifest["target"])
        return self._program

    @property
    def report(self) -> Report:
        """What the compile did, measured and refused."""
        if self._report is None:
            self._report = Report.from_dict(json.loads(self._artifact.file("report.json").read_text(encoding="utf-8")))
        return self._report

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report

    @property
    def path(self) -> Path:
        """The artifact directory."""
        return self._artifact.path

    @property
    def onnx_path(self) -> Path:
        """The quantized model for ONNX Runtime."""
        return self._artifact.file("model.onnx")

    @property
    def manifest(self) -> dict[str, Any]:
        """What was compiled from what, and how."""
        return self._artifact.manifest

    @property
    def size(self) -> int:
        """Bytes of the whole artifact."""
        return self._artifact.size

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the program takes."""
        return _specs(self._artifact.file("program.json"), "inputs")

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the program returns."""
        return _specs(self._artifact.file("program.json"), "outputs")

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Copy the artifact to ``directory``, complete or not at all.

        Raises:
            ArtifactError: the directory exists or cannot be written.
        """
        with artifacts.staged(directory, overwrite=overwrite) as folder:
            shutil.copytree(self.path, folder, dirs_exist_ok=True)
        return Path(directory)

    def keep_alive(self, temporary: str | None) -> None:
        """Remove ``temporary``, which holds the artifact, when this object goes away."""
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, True)

    def __repr__(self) -> str:
        return f"CompiledModel({str(self.path)!r}, {', '.join(map(str, self.inputs))})"


def load(path: str | os.PathLike[str], *, verify: bool = True) -> CompiledModel:
    """Open an artifact directory.

    Args:
        path: the directory.
        verify: check the hash of every file.

    Raises:
        ArtifactError: it is incomplete, was altered, or names files outside itself.
    """
    artifact = artifacts.open_artifact(path, verify=verify)
    program = _content(artifact.file("program.json"))
    target = artifact.manifest.get("target")
    if not isinstance(target, dict) or not isinstance(target.get("kind"), str):
        raise ArtifactError(f"{artifact.path / artifacts.MANIFEST} does not say what target the program is for")
    if missing := [key for key in ("inputs", "outputs") if not isinstance(program.get(key), list)]:
        raise ArtifactError(f"{artifact.path / 'program.json'} lacks the {missing[0]} of the program")
    return CompiledModel(artifact)


def load_program(folder: Path, target: Mapping[str, Any] | None = None) -> Runner:
    """Load the program of an artifact directory, complete or being written.

    Raises:
        TargetError: this machine cannot run it.
        ArtifactError: something is missing.
    """
    if target is None:
        target = _content(folder / "program.json")["target"]
    return get_backend(target["kind"]).load(folder, target)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not readable: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not the description of a program")
    return content


def _specs(path: Path, key: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in _content(path)[key])
