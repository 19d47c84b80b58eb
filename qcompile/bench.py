"""Latency of a compiled program beside ONNX Runtime on the same float model, in the same process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.backends import Runner
from qcompile.errors import InputError
from qcompile.runtime import TensorSpec, aligned, set_threads

Run = Callable[[Mapping[str, np.ndarray]], Any]


@dataclass(frozen=True)
class Point:
    """One setting to measure: extents of the symbolic dimensions and a number of threads."""

    extents: tuple[tuple[str, int], ...]
    threads: int

    def __str__(self) -> str:
        return ", ".join(
            [*(f"{name} {size}" for name, size in self.extents), f"{self.threads} thread{'s' * (self.threads > 1)}"]
        )


def make_feed(inputs: Sequence[TensorSpec], extents: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs of the given extents: integers and booleans are 1 (a valid id and a valid mask), floats normal.

    Raises:
        InputError: an extent is not given, negative, or of no input.
    """
    symbols = {part for spec in inputs for d in spec.shape if isinstance(d, str) for part in d.split(" + ")}
    for name, size in extents.items():
        if name not in symbols:
            known = ", ".join(sorted(part for part in symbols if not part.isdigit())) or "none"
            raise InputError(f"no input has an extent {name!r}; extents of this model: {known}")
        if size < 0:
            raise InputError(f"the extent of {name!r} cannot be negative, it is {size}")
    random = np.random.default_rng(0)
    feed = {}
    for spec in inputs:
        parts = [part for d in spec.shape if isinstance(d, str) for part in d.split(" + ")]
        if missing := [part for part in parts if not part.isdigit() and part not in extents]:
            raise InputError(f"give the extent of {missing[0]!r} (of input {spec}), e.g. `--shape {missing[0]}=1`")
        shape = [_extent(d, extents) for d in spec.shape]
        dtype = np.dtype(spec.dtype)
        values = random.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)
        feed[spec.name] = aligned(values)  # as what programs return, such as a cache, is
    return feed


def _extent(dim: int | str, extents: Mapping[str, int]) -> int:
    """Of a dimension that may be a sum: ``past + sequence``."""
    if isinstance(dim, int):
        return dim
    return sum(int(part) if part.isdigit() else extents[part] for part in dim.split(" + "))


def measure(
    contenders: Mapping[str, Run], feed: Mapping[str, np.ndarray], *, seconds: float = 1.0, rounds: int | None = None
) -> dict[str, float]:
    """Median milliseconds of each contender.

    Contenders take turns in short blocks, so that drift of the machine meets all alike; between blocks the threads of
    the one before get time to go to sleep. A machine whose speed jumps within seconds wants many of them: ``rounds`` are as
    many as blocks of 0.15 s fit, five at least.
    """
    rounds = rounds or max(5, round(seconds / 0.15))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(feed)
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(0.02)
            run(feed)
            end = time.perf_counter() + seconds / rounds
            while True:
                start = time.perf_counter()
                run(feed)
                stop = time.perf_counter()
                times[name].append(1000 * (stop - start))
                if stop > end:
                    break
    return {name: float(np.median(values)) for name, values in times.items()}


class OrtPeers:
    """ONNX Runtime on a float model in several forms: float, dynamic int8 per channel, 4-bit weights.

    Args:
        model: the float graph.
        forms: which forms to build: ``float``, ``int8``, ``nbits4``.
    """

    LABELS: ClassVar[dict[str, str]] = {"float": "ORT float", "int8": "ORT int8", "nbits4": "ORT 4-bit"}

    def __init__(self, model: ir.Model, forms: Sequence[str] = ("float", "int8", "nbits4")) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-peers-")
        root = Path(self._folder.name)
        self._paths = {"float": root / "float.onnx"}
        ir.save(model, self._paths["float"])
        if "int8" in forms:
            self._paths["int8"] = self._int8(root)
        if "nbits4" in forms:
            self._paths["nbits4"] = self._nbits(root, 4)
        self.forms = list(forms)

    def _int8(self, root: Path) -> Path:
        import logging

        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.getLogger().setLevel(logging.ERROR)
        path = root / "int8.onnx"
        quantize_dynamic(
            self._paths["float"], path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"]
        )
        return path

    def _nbits(self, root: Path, bits: int) -> Path:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(self._paths["float"]), bits=bits, block_size=32, is_symmetric=False, accuracy_level=4
        )
        quantizer.process()
        path = root / f"nbits{bits}.onnx"
        quantizer.model.save_model_to_file(str(path), False)
        return path

    def size(self, form: str) -> int:
        """Bytes of the model file."""
        return os.path.getsize(self._paths[form])

    def run(self, form: str, threads: int) -> Run:
        """A function that runs the model in this form."""
        session = ort.session(self._paths[form], threads=threads, settings={"session.x64quantprecision": "1"})
        names = [i.name for i in session.get_inputs()]

        def run(feed: Mapping[str, np.ndarray]) -> Any:
            if missing := [name for name in names if name not in feed]:
                raise InputError(
                    f"the float model reads {', '.join(missing)}, of which the artifact knows nothing; "
                    "compare with the model it was compiled from (`--model`)"
                )
            return session.run(None, {name: feed[name] for name in names})

        return run


def own(program: Runner, feed: Mapping[str, np.ndarray]) -> Run:
    """A function that runs the program; one that can keep its cache in place does, as it does for `generation`."""
    step = getattr(program, "step", None)
    if step is None:
        return program.run
    total = next(feed[s.name].shape[s.shape.index("total")] for s in step.inputs if "total" in s.shape)
    caches = {}
    for name in step.written:
        old = feed[name]
        caches[name] = aligned(np.zeros((*old.shape[:2], total, *old.shape[3:]), old.dtype))
        caches[name][:, :, : old.shape[2]] = old
    return lambda feed: step.run({**feed, **caches})


def compare(
    program: Runner, peers: OrtPeers | None, points: Sequence[Point], *, label: str = "qcompile", seconds: float = 1.0
) -> dict[str, dict[str, float]]:
    """Milliseconds by contender for every point."""
    table: dict[str, dict[str, float]] = {}
    for point in points:
        set_threads(point.threads)
        feed = make_feed(program.inputs, dict(point.extents))
        contenders: dict[str, Run] = {label: own(program, feed)}
        if peers is not None:
            contenders |= {OrtPeers.LABELS[form]: peers.run(form, point.threads) for form in peers.forms}
        table[str(point)] = measure(contenders, feed, seconds=seconds)
    return table
