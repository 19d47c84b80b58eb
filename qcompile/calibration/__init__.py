"""Calibration: run representative inputs through the float graph and keep statistics of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.calibration.data import Feed, InputSpec, load_feeds, text_encoder
from qcompile.calibration.statistics import ChannelStatistics
from qcompile.errors import CalibrationError

__all__ = ["ChannelStatistics", "Feed", "InputSpec", "collect", "input_specs", "load_feeds", "text_encoder"]


def input_specs(model: ir.Model) -> list[InputSpec]:
    """Inputs of a model as `InputSpec`."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        dims = [] if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
        specs.append(InputSpec(value.name or "", value.dtype.numpy() if value.dtype else None, tuple(dims)))
    return specs


def collect(
    model: ir.Model,
    feeds: Iterable[Mapping[str, np.ndarray]],
    values: Sequence[str],
    *,
    hessian: Sequence[str] = (),
    channel_axis: Mapping[str, int] | None = None,
    readers: Mapping[str, Sequence[Callable[[np.ndarray], None]]] | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Run ``feeds`` through ``model`` in ONNX Runtime and gather statistics of the named values.

    Args:
        model: any stage that ONNX Runtime executes.
        feeds: input dictionaries.
        values: names of values, each ``(..., K)``; leading axes are rows (tokens).
        channel_axis: where the channels are instead, by name (1 for inputs of convolutions).
        hessian: those of ``values`` whose second moment ``X^T X`` is wanted.
        readers: what else wants to see the arrays of values, of ``values`` or others.
        progress: called after every sample.

    Returns:
        Statistics by value name.

    Raises:
        CalibrationError: a sample cannot be run, or makes the model produce NaN.
    """
    names = list(dict.fromkeys([*values, *(readers or {})]))
    session = ort.session(model, outputs=names)
    found: dict[str, ChannelStatistics] = {}
    inputs = {v.name for v in session.get_inputs()}
    wanted_hessian = set(hessian)
    for index, feed in enumerate(feeds):
        direct = {name: feed[name] for name in names if name in inputs}
        fetch = [name for name in names if name not in direct]
        try:
            arrays = dict(zip(fetch, session.run(fetch, {k: v for k, v in feed.items() if k in inputs}))) | direct
        except Exception as error:
            raise CalibrationError(
                f"calibration sample {index} cannot be run: {str(error).strip().splitlines()[0]}"
            ) from None
        for name, array in arrays.items():
            for reader in (readers or {}).get(name, ()):
                reader(array)
            if name not in values:
                continue
            array = np.moveaxis(array, (channel_axis or {}).get(name, -1), -1)
            if name not in found:
                found[name] = ChannelStatistics(array.shape[-1], name in wanted_hessian)
            if not np.isfinite(array).all():
                raise CalibrationError(f"calibration sample {index} makes {name} NaN or infinite")
            found[name].update(array)
        if progress is not None:
            progress()
    for statistics in found.values():
        statistics.flush()
    return found
