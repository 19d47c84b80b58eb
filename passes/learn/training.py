"""Training loops over a `Program`: of the whole model against its float results, or block by block.

Both run a number of steps within a time budget. The length of a step falls linearly with the larger of two fractions,
steps done and time used, so a training that runs out of time ends as gently as one that runs out of steps. Everything
but the clock is deterministic for a given seed.

Some samples are held out. They are looked at before the first step, ten times on the way and after the last one, and the
parameters that served them best are kept: what is learned is never worse than where it began, on samples it has not seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompile.errors import CalibrationError
from qcompile.passes.blocks import Block
from qcompile.passes.learn.freedoms import Freedom, Tensor
from qcompile.passes.learn.losses import choose, mse
from qcompile.passes.learn.program import Program
from qcompile.passes.learn.replay import Replay, tensor_cores
from qcompile.passes.learn.stiefel import Cayley

Feed = Mapping[str, np.ndarray]
Stage = Callable[[str, int], contextlib.AbstractContextManager[Callable[..., None]]]
"""``(title, steps) -> context manager`` of a function to call after every step, maybe with a note."""


FEWEST = 4
"""Samples held out, at least, if any are."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: most steps.
        seconds: most wall-clock time, None for no limit.
        batch: samples per step.
        rotation_rate: step length on the Stiefel manifold, radians per entry.
        rate: step length of logarithms of scales and the like.
        adaptive: Cayley Adam instead of Cayley SGD.
        seed: of the order of the samples.
        holdout: share of the samples that are held out.
        largest: most samples that are held out.
    """

    steps: int
    seconds: float | None
    batch: int
    rotation_rate: float
    rate: float
    adaptive: bool = True
    seed: int = 0
    holdout: float = 0.0
    largest: int = 32

    def divide(self, count: int) -> tuple[list[int], list[int]]:
        """Numbers of the samples to learn from and of those held out, the latter spread over all.

        Fewer than `FEWEST` tell nothing, and none is held out.
        """
        kept = min(round(self.holdout * count), self.largest)
        kept = kept if kept >= FEWEST else 0
        held = {int(i) for i in (np.arange(kept) + 0.5) * count / max(kept, 1)}
        return [i for i in range(count) if i not in held], sorted(held)


@dataclass
class Clock:
    """Steps and time used."""

    schedule: Schedule
    share: float = 1.0
    started: float = field(default_factory=lambda: time.monotonic())
    done: int = 0

    @property
    def fraction(self) -> float:
        """Finished fraction, 0 to 1."""
        used = self.done / max(self.schedule.steps, 1)
        if self.schedule.seconds is not None:
            budget = max(self.schedule.seconds * self.share, 1e-9)
            used = max(used, (time.monotonic() - self.started) / budget)
        return min(used, 1.0)


@dataclass(frozen=True)
class Outcome:
    """Loss before and after, and how many steps were made.

    Attributes:
        held: loss of the samples held out, before and after; None if there are none.
        note: why steps were slower than they could be.
    """

    before: float
    after: float
    steps: int
    held: tuple[float, float] | None = None
    note: str = ""

    def __str__(self) -> str:
        text = f"loss {self.before:.4g} -> {self.after:.4g} in {self.steps} steps"
        if self.held is not None:
            text += f", on samples held out {self.held[0]:.4g} -> {self.held[1]:.4g}"
        return text + (f" ({self.note})" if self.note else "")


class Descent:
    """Optimizers of the parameters that a training moves."""

    def __init__(
        self, program: Program, freedoms: Sequence[Freedom], activations: set[str], schedule: Schedule
    ) -> None:
        orthogonal, free, clips = [], [], []
        for part in [*freedoms, *(m for a, m in program.mixings.items() if a in activations)]:
            orthogonal += part.parameters.orthogonal
            free += part.parameters.free
        free += [t for a, t in program.shifts.items() if a in activations]
        weights = {s.weight for s in program.sites.values() if s.activation in activations}
        clips += [t for a, t in program.clips.items() if a in activations]
        clips += [t for w, t in program.weight_clips.items() if w in weights]
        self.schedule, self.freedoms = schedule, freedoms
        self.optimizers: list[torch.optim.Optimizer] = []
        if orthogonal:
            second = 0.999 if schedule.adaptive else 0.0
            self.optimizers.append(Cayley(orthogonal, schedule.rotation_rate, adaptive=second))
        groups: list[dict[str, Any]] = [
            {"params": free, "lr": schedule.rate},
            {"params": clips, "lr": 5 * schedule.rate},
        ]
        groups = [g for g in groups if g["params"]]
        if groups:
            self.optimizers.append(torch.optim.Adam(groups, betas=(0.9, 0.99)))
        self._rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]

    def begin(self, fraction: float) -> None:
        """Before a step: set its length, forget gradients, tell the freedoms how far the training is."""
        for optimizer, rates in zip(self.optimizers, self._rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * max(1 - fraction, 0.01)
        for freedom in self.freedoms:
            freedom.progress(fraction)

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that moves."""
        return [p for o in self.optimizers for g in o.param_groups for p in g["params"]]

    @property
    def steady(self) -> bool:
        """Whether all steps do the same computations."""
        return all(freedom.steady for freedom in self.freedoms)

    def step(self) -> None:
        """Move everything; a step without finite gradients is left out."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and bool(torch.stack([g.isfinite().all() for g in gradients]).all()):
            for optimizer in self.optimizers:
                optimizer.step()


def train(program: Program, feeds: Sequence[Feed], schedule: Schedule, loss: str, stage: Stage, title: str) -> Outcome:
    """Train everything at once, against the float results of the whole model.

    Raises:
        CalibrationError: there are no samples.
    """
    if not feeds:
        raise CalibrationError(
            f"{title} learns from calibration samples, and there are none; give `calibration` (`--calibration`)"
        )
    outputs = {
        v.name or "": choose(loss, v)
        for v in program.model.graph.outputs
        if v.dtype is None or v.dtype.is_floating_point()
    }
    descent = Descent(program, program.freedoms, {s.activation for s in program.sites.values()}, schedule)

    def sample_loss(step: Any, feed: Feed) -> Tensor:
        with torch.no_grad():
            exact = program.run(None, feed, list(outputs))
        rounded = program.run(step, feed, list(outputs))
        return sum((f(exact[n], rounded[n]) for n, f in outputs.items()), torch.zeros((), device=program.like.device))

    with stage(title, schedule.steps) as advance:
        return _loop(program, descent, schedule, feeds, sample_loss, advance, 1.0, None, None)


def train_blocks(
    program: Program,
    feeds: Sequence[Feed],
    parts: Sequence[Block],
    schedule: Schedule,
    stage: Stage,
    title: str,
    *,
    through_rounded: bool = False,
) -> list[Outcome]:
    """Train block after block, each on its own inputs and float outputs; ``schedule`` is for each block.

    Args:
        parts: see `blocks.blocks`.
        through_rounded: feed each block what the rounded blocks before it compute, instead of the float model's values.

    Raises:
        CalibrationError: there are no samples.
    """
    if not feeds:
        raise CalibrationError(
            f"{title} learns from calibration samples, and there are none; give `calibration` (`--calibration`)"
        )
    if not parts:
        return []
    seen: list[Tensor | None] = [None] * len(feeds)
    exact, source = seen, ""
    outcomes = []

    def through(step: Any, values: Sequence[Tensor | None], start: str, end: str) -> list[Tensor]:
        """Take the value ``start`` of every sample to ``end``."""
        with torch.no_grad():
            return [program.run(step, _entering(f, start, x), [end])[end] for f, x in zip(feeds, values)]

    with stage(title, schedule.steps * len(parts)) as advance:
        for part in parts:
            if source != part.source:
                seen, exact = (through(None, xs, source, part.source) for xs in (seen, exact))  # type: ignore[assignment]
            target = through(None, exact, part.source, part.target)
            nodes = [n for n in part.nodes if n in program.sites]
            activations = {program.sites[n].activation for n in nodes}
            inside = [f for f in program.freedoms if touched(f) <= part.constants]
            descent = Descent(program, inside, activations, schedule)

            def sample_loss(step: Any, feed: Feed, part=part) -> Tensor:
                return mse(
                    feed[part.target], program.run(step, _without(feed, part.target), [part.target])[part.target]
                )

            samples = [{**_entering(f, part.source, x), part.target: y} for f, x, y in zip(feeds, seen, target)]
            share = 1 / len(parts)
            outcomes.append(
                _loop(program, descent, schedule, samples, sample_loss, advance, share, part.constants, nodes)
            )
            if through_rounded:
                with torch.no_grad():
                    step = program.step(part.constants, nodes)
                seen = through(step, seen, part.source, part.target)  # type: ignore[assignment]
            else:
                seen = target  # type: ignore[assignment]
            exact, source = target, part.target  # type: ignore[assignment]
            program.release(part.constants)
    return outcomes


def _entering(feed: Feed, name: str, value: Tensor | None) -> dict[str, Any]:
    """A sample with the value that enters a block; the first block starts at the graph's inputs."""
    return {**feed, name: value} if name else dict(feed)


def _without(feed: Feed, name: str) -> dict[str, Any]:
    return {k: v for k, v in feed.items() if k != name}


def stacked(model: ir.Model, feeds: Sequence[Feed]) -> list[dict[str, Any]]:
    """Join samples along the first axis where that is a batch axis of every value in them, else leave them alone.

    It is one if the model calls the first dimension of all of them by one name, and the samples agree in shape.
    """
    names = set(feeds[0])
    values = [v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs)) if v.name in names]
    first = {v.shape[0] if v.shape is not None and len(v.shape) else None for v in values}
    (batch,) = first if len(first) == 1 else (None,)
    alike = all(
        {k: tuple(v.shape) for k, v in f.items()} == {k: tuple(v.shape) for k, v in feeds[0].items()} for f in feeds
    )
    if not isinstance(batch, ir.SymbolicDim) or batch.value is None or not alike or len(values) != len(names):
        return [dict(f) for f in feeds]
    joined: dict[str, Any] = {}
    for name in feeds[0]:
        parts = [f[name] for f in feeds]
        joined[name] = torch.cat(parts) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)
    return [joined]


def touched(freedom: Freedom) -> set[str]:
    """Constants that a freedom changes: the members of its family and of those that follow it."""
    spaces = freedom.spaces
    related = {
        s.index
        for s in spaces
        if s.family == freedom.space.family or s.leader == freedom.space.index or s is freedom.space
    }
    return {m.name for i in related for m in spaces[i].members}


def _loop(
    program: Program,
    descent: Descent,
    schedule: Schedule,
    feeds: Sequence[Feed],
    sample_loss: Callable[[Any, Feed], Tensor],
    advance: Callable[..., None],
    share: float,
    names: Any,
    nodes: Any,
) -> Outcome:
    rng = np.random.default_rng(schedule.seed)
    learning, held = schedule.divide(len(feeds))
    batch = min(schedule.batch, len(learning))

    def joined(chosen: Sequence[int]) -> list[dict[str, Any]]:
        parts = stacked(program.model, [feeds[i] for i in chosen])
        return [{**feed, **program.prefix(feed)} for feed in parts]

    def gradients(parts: Sequence[Feed]) -> Tensor:
        """Mean loss; its gradients are left with the parameters."""
        with tensor_cores():
            made = program.step(names, nodes)
            leaves, total = made.detached(), torch.zeros((), device=program.like.device)
            for feed in parts:
                value = sample_loss(leaves, feed) / len(parts)
                value.backward()
                total = total + value.detach()
            made.backward(leaves)
        return total

    def judge() -> float:
        with torch.no_grad(), tensor_cores():
            made, values = program.step(names, nodes), []
            for start in range(0, len(held), batch):
                parts = joined(held[start : start + batch])
                values += [
                    float(sample_loss(made, feed)) * len(held[start : start + batch]) / len(parts) for feed in parts
                ]
        return sum(values) / len(held)

    order: list[int] = []
    clock = Clock(schedule, share)
    losses: list[float] = []
    best = Best(descent.parameters, judge) if held and descent.optimizers else None
    replay = Replay(gradients, descent.parameters) if descent.steady else gradients
    while clock.fraction < 1 and descent.optimizers:
        descent.begin(clock.fraction)
        if best is not None:
            best.look(clock.fraction)
        if len(order) < batch:
            order += rng.permutation(learning).tolist()
        chosen, order = order[:batch], order[batch:]
        for p in descent.parameters:
            if p.grad is not None:
                p.grad.zero_()
        losses.append(float(replay(joined(chosen))))
        descent.step()
        clock.done += 1
        advance(f"loss {np.mean(losses[-10:]):.4g}")
    if not losses:
        return Outcome(float("nan"), float("nan"), 0)
    edge = max(1, min(10, len(losses) // 4))
    note = replay.refused if isinstance(replay, Replay) else ""
    seen = best.finish() if best is not None else None
    return Outcome(float(np.mean(losses[:edge])), float(np.mean(losses[-edge:])), len(losses), seen, note)


class Best:
    """The parameters that served the samples held out best.

    Args:
        parameters: what moves.
        judge: their loss.
        looks: how many times to look on the way.
    """

    def __init__(self, parameters: Sequence[Tensor], judge: Callable[[], float], looks: int = 10) -> None:
        self.parameters, self.judge, self.looks = parameters, judge, looks
        self.first = self.loss = float("inf")
        self.kept: list[Tensor] = []
        self.done = -1

    def look(self, fraction: float) -> None:
        """Judge the parameters if the next tenth of the training is done."""
        if int(fraction * self.looks) == self.done:
            return
        loss = self.judge()
        if self.done < 0:
            self.first = loss
        if loss < self.loss:
            self.loss, self.kept = loss, [p.detach().clone() for p in self.parameters]
        self.done = int(fraction * self.looks)

    def finish(self) -> tuple[float, float]:
        """Restore the best; returns the loss at first and at the best."""
        self.done -= 1
        self.look(1.0)
        with torch.no_grad():
            for p, kept in zip(self.parameters, self.kept):
                p.copy_(kept)
        return self.first, self.loss
