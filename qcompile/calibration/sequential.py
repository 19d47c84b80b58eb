"""Second moments measured layer by layer, behind the layers that are quantized already.

A layer of the quantized model does not see the inputs ``X`` that it sees in the float model but ``X'``: computed by
quantized layers and rounded itself. What a second-order solver should minimise is ``|X W - X' Q|``, so it needs

    H = X'^T X' / tokens        C = X'^T X / tokens

(see `qcompile.solvers.correction`). Both models advance side by side from border to border (`qcompile.passes.blocks`), so
the cost is a few runs of each block, whatever the depth.

Source: Frantar and Alistarh, "Optimal Brain Compression" (2022), section 5 (sequential quantization).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.calibration.data import Feed
from qcompile.calibration.statistics import ChannelStatistics
from qcompile.errors import CalibrationError
from qcompile.passes.blocks import borders
from qcompile.passes.domain import add_functions

Array = Any
"""numpy array, or torch tensor where a device is asked for."""
Round = Callable[[str, Array], Array]
"""``(name of the activation, rows) -> rows as its readers see them``."""


class SequentialStatistics(Mapping[str, ChannelStatistics]):
    """Statistics of activations of ``live``, measured when they are asked for, in graph order.

    Args:
        live: the model, while it is being quantized from front to back.
        feeds: calibration samples.
        sites: names of the nodes that are quantized, and the activation each of them reads.
        rounded: how each is rounded.
        progress: called after every sample that has passed a layer.
        device: "cpu" for ONNX Runtime, else torch's name of a device, on which samples run and moments are taken.

    Raises:
        CalibrationError: an activation is asked for after one behind it.
    """

    def __init__(
        self,
        live: ir.Model,
        feeds: Sequence[Feed],
        sites: Mapping[str, str],
        rounded: Round,
        progress: Callable[[], None] | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.live, self.exact = live, live.clone()
        self.feeds, self.names, self.rounded = feeds, list(dict.fromkeys(sites.values())), rounded
        self.progress = progress or (lambda: None)
        place = {v.name or "": i for i, node in enumerate(self.exact.graph) for v in node.outputs}
        self.place = {v.name or "": 0 for v in self.exact.graph.inputs} | place
        self.borders = [v.name or "" for v in borders(self.exact, sites)]
        self.at = 0
        self.source = ""
        self.inputs: dict[bool, list[Array]] = {}
        self._known: dict[str, ChannelStatistics] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> ChannelStatistics:
        if name not in self._known:
            if name not in self.names:
                raise KeyError(name)
            self._advance(name)
            # What was known before belongs to layers that are done; only one activation's moments are kept.
            self._known = {name: self._measure(name)}
        return self._known[name]

    def _advance(self, name: str) -> None:
        """Take both models to the last border at or before an activation."""
        if self.source and self.place[name] < self.place[self.source]:
            raise CalibrationError(f"{name} is asked for after layers behind it have been quantized")
        while self.at < len(self.borders) and self.place[self.borders[self.at]] <= self.place[name]:
            target = self.borders[self.at]
            self.inputs = {live: list(self._run(live, target)) for live in (False, True)}
            self.source, self.at = target, self.at + 1

    def _measure(self, name: str) -> ChannelStatistics:
        if self.device != "cpu":
            return self._moments(name)
        statistics: ChannelStatistics | None = None
        for seen, exact in zip(self._run(True, name), self._run(False, name)):
            if statistics is None:
                statistics = ChannelStatistics(seen.shape[-1], with_hessian=True, with_cross=True)
            if not np.isfinite(seen).all():
                raise CalibrationError(f"a calibration sample makes {name} NaN or infinite")
            statistics.update(self.rounded(name, seen), exact)
            self.progress()
        assert statistics is not None
        statistics.flush()
        return statistics

    def _moments(self, name: str) -> ChannelStatistics:
        """The same on a device; moments alone."""
        import torch

        sums: list[Any] = []
        tokens = 0
        for seen, exact in zip(self._run(True, name), self._run(False, name)):
            seen, exact = (torch.as_tensor(t, device=self.device) for t in (seen, exact))
            rows, exact = (t.reshape(-1, t.shape[-1]) for t in (self.rounded(name, seen), exact))
            if not bool(torch.isfinite(rows).all()):
                raise CalibrationError(f"a calibration sample makes {name} NaN or infinite")
            products = [rows.T @ rows, rows.T @ exact]
            sums = [a + b for a, b in zip(sums, products)] if sums else [p.double() for p in products]
            tokens += len(rows)
            self.progress()
        moment, cross = (s.cpu().numpy() for s in sums)
        statistics = ChannelStatistics(len(moment), with_hessian=True, with_cross=True, tokens=tokens)
        statistics.moment, statistics.cross_moment = moment, cross
        return statistics

    def _run(self, live: bool, name: str) -> Iterator[Array]:
        """Values of ``name`` for every sample, in the quantized or the float model."""
        if name == self.source:
            yield from self.inputs[live]
            return
        session, wanted = None, set[str]()
        for index, feed in enumerate(self.feeds):
            if name in feed:
                yield feed[name]
                continue
            if session is None:
                session = self._session(live, name)
                wanted = {i.name for i in session.get_inputs()}
            given = {k: v for k, v in feed.items() if k in wanted}
            if self.source:
                given[self.source] = self.inputs[live][index]
            try:
                yield session.run([name], given)[0]
            except Exception as error:
                text = str(error).strip().splitlines()[0]
                raise CalibrationError(f"calibration sample {index} cannot be run: {text}") from None

    def _session(self, live: bool, name: str) -> Any:
        model = self.live if live else self.exact
        inputs = [v.name or "" for v in model.graph.inputs]
        part = ir.Model(
            ir.convenience.extract(model.graph, [*inputs, *([self.source] if self.source else [])], [name]),
            ir_version=model.ir_version,
        )
        part.opset_imports.update(model.opset_imports)
        for key, function in model.functions.items():
            part.functions[key] = function.clone()
        add_functions(part)
        return ort.session(part) if self.device == "cpu" else _Interpreted(part, self.device)


class _Interpreted:
    """A model on a device, behind the two methods of a session that are used here."""

    def __init__(self, model: ir.Model, device: str) -> None:
        import torch

        self.model, self.device = model, device
        self.constants = {
            name: torch.as_tensor(value.const_value.numpy().astype(np.float32), device=device)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point()
        }

    def get_inputs(self) -> list[ir.Value]:
        return list(self.model.graph.inputs)

    def run(self, names: list[str], inputs: Mapping[str, Array]) -> list[Array]:
        from qcompile.passes.execute import run

        found = run(self.model, inputs, names, dtype="float32", constants=self.constants, device=self.device)
        return [found[name] for name in names]
