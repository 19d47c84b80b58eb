"""`compile`: the whole pipeline, from a float model to an artifact."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import artifact as artifacts
from qcompile import ort
from qcompile.backends import Job, get_backend
from qcompile.calibration import Feed, collect, input_specs, load_feeds
from qcompile.compiled import CompiledModel, load
from qcompile.errors import CalibrationError, ModelError, RecipeError, TargetError, UnsupportedOperatorError
from qcompile.generation import TOKENIZER
from qcompile.passes.sites import conv_sites, linear_sites, matrix_sites
from qcompile.progress import Progress
from qcompile.quantization import (
    convolution_moments,
    expert_moments,
    quantize_model,
    sites_with_hessian,
    spare_routers,
)
from qcompile.recipes import Recipe, get_recipe
from qcompile.report import Report
from qcompile.targets import Target, get_target
from qcompile.transforms import TransformContext, apply_transforms

MAX_CHECK_SAMPLES = 8
"""Samples on which the result is compared with the float model."""

MAX_CHECK_BYTES = 1 << 29
"""Bytes of outputs that are kept for the comparison: fewer samples where one has many."""

LARGE_MODEL, MAX_LARGE_SAMPLES = 1 << 30, 2
"""Bytes of float weights from which ONNX Runtime brings packed weights back in every run, on few samples.

When it folds them into constants it keeps every intermediate result until the end: 26 bytes per weight.
"""

Outputs = Mapping[str, np.ndarray]


@dataclass
class Stages:
    """Saves the model after every stage, if a folder is given.

    Attributes:
        folder: where the stages go, or None.
        mlir: where the float stages go as MLIR, or None.
        saved: names of the stages so far.
        refused: stages that could not be written as MLIR, with the reason.
    """

    folder: Path | None
    mlir: Path | None = None
    saved: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def save(self, name: str, model: ir.Model) -> None:
        """Write ``NN-name.onnx`` with its weights beside it, and float stages as MLIR if that is wanted."""
        if self.mlir is not None and name in ("captured", "transformed"):
            self._emit_mlir(name, model)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved.append(name)
        stem = f"{len(self.saved):02d}-{name}"
        ir.save(model.clone(), self.folder / f"{stem}.onnx", external_data=f"{stem}.data")

    def _emit_mlir(self, name: str, model: ir.Model) -> None:
        from qcompile.capture.mlir import emit_mlir

        assert self.mlir is not None
        try:
            text = emit_mlir(model)
        except UnsupportedOperatorError as error:
            self.refused.append((name, str(error)))
            return
        self.mlir.mkdir(exist_ok=True)
        (self.mlir / f"{name}.mlir").write_text(text, encoding="utf-8")


def compile(
    model: Any,
    *,
    target: Any = "native",
    recipe: str | Path | Recipe = "w8a8",
    calibration: Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    keep_stages: str | os.PathLike[str] | None = None,
    emit: Sequence[str] = (),
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    max_tokens: int = 512,
    max_samples: int = 256,
    capture_options: Mapping[str, Any] | None = None,
    prove: bool = True,
    progress: bool | None = None,
    **changes: Any,
) -> CompiledModel:
    """Compile a float model to a low-bit program.

    Args:
        model: an ONNX file, a Hugging Face directory, ``package:attribute``, a torch module or exported program, an
            ``onnx.ModelProto`` or an ``onnx_ir.Model``; see `qcompile.capture.capture`.
        target: a target name (``qcompile targets``) or `Target`; ``native`` is this machine.
        recipe: a recipe's name, a ``.toml`` file, or a `Recipe`.
        calibration: path of a ``.npz``, ``.txt`` or ``.jsonl``, or an iterable; None for data-free compilation.
        tokenizer: path of ``tokenizer.json`` for texts, of calibration and of a decoder's artifact; found by itself in a
            Hugging Face directory.
        output: directory of the artifact; a temporary one if None.
        overwrite: replace an artifact that is there already.
        keep_stages: folder that receives the model after every stage.
        emit: ``["mlir"]`` writes the captured and the transformed model as MLIR (linalg) into the artifact.
        variant: which machine of the target's kind: a processor, an architecture or a device.
        options: what the target's backend takes, see `qcompile.backends`.
        max_tokens, max_samples: length and number of calibration samples used.
        capture_options: passed on to capture (``example_inputs``, ``dynamic``, ``task``, ``kv_cache`` ...).
        prove: check the analysis of channel spaces and the transforms on one calibration sample, in float32.
        progress: show bars; by default on a terminal.
        **changes: fields of the recipe to change: ``weight="int4/g64"``, ``activation="none"``, ``solver="rtn"`` ...

    Returns:
        The loaded artifact, callable.

    Raises:
        QcompileError: one of its subclasses, with a message that names the file, tensor or node.
    """
    from qcompile.capture import capture
    from qcompile.passes.recognise import recognise

    try:
        chosen = get_recipe(recipe, **changes)
    except TypeError as error:
        if misplaced := [name for name in changes if name in inspect.signature(capture).parameters]:
            raise RecipeError(
                f"{misplaced[0]} is an option of capture: pass capture_options={{{misplaced[0]!r}: ...}}"
            ) from None
        raise RecipeError(f"a recipe has no such field: {error}") from None
    machine = resolve_target(target, variant)
    backend = get_backend(machine.kind)
    options, forms = dict(options or {}), tuple(form for form in emit if form != "mlir")
    backend.check_options(options, forms)
    backend.check_tools(machine)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ModelError(f"tokenizer file {os.fspath(tokenizer)} does not exist")
    temporary = None
    if output is None:
        temporary = tempfile.mkdtemp(prefix="qcompile-")
        output = Path(temporary) / "artifact"
    try:
        with Progress(progress) as bars, artifacts.staged(output, overwrite=overwrite) as folder:
            stages = Stages(Path(keep_stages) if keep_stages else None, folder / "mlir" if "mlir" in emit else None)
            with bars.stage("capture"):
                captured = capture(model, **(capture_options or {}))
                captured.tokenizer = Path(tokenizer) if tokenizer is not None else captured.tokenizer
                stages.save("captured", captured.model)
            with bars.stage("recognise"):
                graph, recognised = recognise(captured.model)
                stages.save("recognised", graph)
            chosen = spare_routers(chosen, graph)
            report = Report(
                str(captured.source.get("name") or captured.source.get("path") or "model"), str(machine), chosen.name
            )
            report.recognised = dict(recognised.composites)
            feeds = _feeds(calibration, graph, captured.tokenizer, max_tokens, max_samples)
            reference = graph
            before = _statistics(graph, chosen, feeds, bars, hessian=not chosen.transforms)
            after = before
            graph = graph.clone()
            if chosen.transforms:
                with bars.stage("transform", total=None) as advance:
                    graph = apply_transforms(
                        graph, TransformContext(chosen, feeds, report, advance, before, prove, bars.stage)
                    )
                stages.save("transformed", graph)
                after = _statistics(graph, chosen, feeds, bars, hessian=True)
            inputs = _site_inputs(graph)
            with bars.stage("quantize", total=max(len(inputs), 1)) as advance:
                quantized = quantize_model(graph, chosen, after, report, lambda name: advance(), feeds=feeds)
            _channel_ranges(report, (_site_inputs(reference), before), (inputs, after))
            stages.save("quantized", quantized)
            for name, reason in stages.refused:
                report.refuse("emit MLIR", name, reason)
            backend.emit(Job(folder, quantized, machine, report, options, forms, stages.save, bars.stage, feeds))
            with bars.stage("check against float"):
                samples = feeds[:MAX_CHECK_SAMPLES] or _example(captured.example_inputs)
                _check(folder, reference, samples, report)
            if captured.tokenizer is not None and "generation" in captured.source:
                shutil.copyfile(captured.tokenizer, folder / TOKENIZER)
            _write(folder, report, chosen, machine, captured.source)
        result = load(output, verify=False)
        result.report = report
        result.keep_alive(temporary)
        temporary = None
        return result
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def resolve_target(target: Any, variant: str | None = None) -> Target:
    """Return a `Target` from a name.

    Raises:
        TargetError: the name or the variant is unknown.
    """
    return target if isinstance(target, Target) else get_target(str(target), variant=variant)


def _feeds(calibration: Any, graph: ir.Model, tokenizer: Any, max_tokens: int, max_samples: int) -> list[Feed]:
    if calibration is None:
        return []
    if max_samples < 1 or max_tokens < 1:
        raise CalibrationError(f"max_samples and max_tokens must be positive, not {max_samples} and {max_tokens}")
    feeds = load_feeds(calibration, input_specs(graph), tokenizer=tokenizer, max_tokens=max_tokens)
    if len(feeds) > max_samples:
        # Spread over the whole file: neighbours are often alike.
        feeds = [feeds[i] for i in np.linspace(0, len(feeds) - 1, max_samples).astype(int)]
    return feeds


def _statistics(
    graph: ir.Model, recipe: Recipe, feeds: Sequence[Feed], bars: Progress, *, hessian: bool
) -> dict[str, Any]:
    sites = [s for s in matrix_sites(graph) if recipe.weight_format(s.name) is not None]
    static = any(
        recipe.activation_format(s.name).granularity == "tensor" for s in sites if recipe.activation_format(s.name).bits
    )
    if not feeds:
        if static:
            raise CalibrationError(f"recipe {recipe.name!r} has static activations and needs calibration data")
        return {}
    values = list(dict.fromkeys(s.x.name or "" for s in sites))
    if not values:
        return {}
    wanted = sites_with_hessian(graph, recipe) if hessian else set()
    rows = {s.x.name for s in linear_sites(graph)}
    channels = {s.x.name or "": 1 for s in conv_sites(graph) if s.x.name not in rows}
    patches = convolution_moments(graph, recipe) if hessian else {}
    readers: dict[str, list[Any]] = {}
    for moments in patches.values():
        readers.setdefault(moments.source, []).append(moments.update)
    experts = expert_moments(graph, recipe) if hessian else {}
    for stack in experts.values():
        readers.setdefault(stack.source, []).append(stack.see_rows)
        if stack.fixed is None:
            readers.setdefault(stack.ids, []).append(stack.see_ids)
    with bars.stage("calibrate" if hessian else "observe", total=len(feeds)) as advance:
        known = collect(
            graph, feeds, values, hessian=sorted(wanted), channel_axis=channels, readers=readers, progress=advance
        )
    return known | patches | experts


def _site_inputs(graph: ir.Model) -> dict[str, str]:
    """Name of the activation of every site; a transform may have put operators in front of it."""
    return {s.name: s.x.name or "" for s in matrix_sites(graph)}


def _channel_ranges(report: Report, *known: tuple[Mapping[str, str], Mapping[str, Any]]) -> None:
    """Note the ranges of every site's input before and after the transforms, from names and statistics of both."""
    for layer in report.layers:
        layer.before, layer.after = (
            [float(v) for v in found[name].absmax] if (name := inputs.get(layer.name, "")) in found else None
            for inputs, found in known
        )


def _check(folder: Path, reference: ir.Model, samples: Sequence[Feed], report: Report) -> None:
    """Compare the compiled program, if this machine can run it, and ``model.onnx`` with the float model."""
    from qcompile.compiled import load_program

    if not samples:
        report.refuse("compare with the float model", "whole model", "no calibration data and no example inputs")
        return
    large = ort.weight_bytes(reference) > LARGE_MODEL
    sums: dict[str, list[float]] = {}

    def compare(key: str, have: Sequence[Outputs], want: Sequence[Outputs]) -> None:
        for mine, theirs in zip(have, want):
            a, b = (
                np.concatenate([np.ravel(v).astype(np.float64) for v in values.values()]) for values in (mine, theirs)
            )
            size, other = np.linalg.norm(a), np.linalg.norm(b)
            sums.setdefault(f"{key}_cosine", []).append(float(a @ b / (size * other or 1)))
            sums.setdefault(f"{key}_error", []).append(float(np.linalg.norm(a - b) / (other or 1)))

    # One after the other: a session of a large model and what it makes of the weights take many times their bytes.
    session, exact = ort.session(reference), []
    for feed in samples[:MAX_LARGE_SAMPLES] if large else samples:
        exact.append(ort.run(session, feed))
        if sum(v.nbytes for outputs in exact for v in outputs.values()) > MAX_CHECK_BYTES:
            break
    del session
    samples = samples[: len(exact)]
    got: list[Outputs] = []
    try:
        program = load_program(folder)
        got = [program.run({s.name: feed[s.name] for s in program.inputs}) for feed in samples]
        del program
    except TargetError as error:
        report.refuse("run the program", "this machine", str(error))
    compare("program_to_float", got, exact)
    session = ort.session(folder / "model.onnx", fold=not large)
    emitted = [ort.run(session, feed) for feed in samples]
    compare("onnx_to_float", emitted, exact)
    compare("program_to_onnx", got, emitted)
    report.quality = {key: float(np.mean(values)) for key, values in sums.items()} | {"samples": float(len(samples))}


def _example(example: Mapping[str, np.ndarray] | None) -> list[Feed]:
    return [dict(example)] if example else []


def _write(folder: Path, report: Report, recipe: Recipe, machine: Any, source: Mapping[str, Any]) -> None:
    from qcompile.report.html import write_html

    report.size = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_html(folder / "report.html", report)
    (folder / "report.json").write_text(_json(report.to_dict()), encoding="utf-8")
    versions = {
        p: importlib.metadata.version(p)
        for p in ("qcompile", "apache-tvm", "apache-tvm-ffi", "onnx", "onnxruntime", "numpy")
    }
    artifacts.write_manifest(
        folder,
        {
            "source": dict(source),
            "recipe": recipe.to_dict(),
            "target": {
                "kind": machine.kind,
                "cpu": machine.cpu,
                "features": sorted(machine.features),
                "cores": machine.cores,
            },
            "versions": {**versions, "python": platform.python_version()},
        },
    )


def _json(value: Any) -> str:
    import json

    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"
