"""What all learned methods share: options, the choice of samples, training, and folding the result.

A method is an ask that says which freedoms a model has for it (`build`); the rest happens here. The training simulates
the rounding that the recipe asks for, so what is learned fits its formats.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompile.errors import CalibrationError, RecipeError
from qcompile.passes.asks.base import Ask, Context, Entry
from qcompile.passes.spaces import Spaces, analyse

if TYPE_CHECKING:
    from qcompile.passes.learn.program import Program


@dataclass(frozen=True)
class Learned(Ask):
    """Options of every learned transformation.

    Attributes:
        steps: most steps of the training (of each block, if block by block).
        seconds: most wall-clock time of the whole training; None for no limit.
        samples: most calibration samples used, spread over all of them.
        batch: samples per step.
        rotation_rate: step length of orthogonal matrices, about radians per entry and step.
        rate: step length of logarithms of scales; clipping moves five times as fast.
        loss: "auto" (kl for logits, mse for hidden states), "kl", "kl-top" or "mse"; block by block it is always mse.
        blockwise: train block after block on recorded inputs and outputs, instead of the whole model at once.
        span: neighbouring blocks (residual additions) trained together.
        clip: learn which share of a token's range is represented.
        clip_weights: learn the same of weights, for the simulation only: the solver chooses its own grid.
        round_weights: simulate the rounding of weights too, not of activations alone; None leaves them out where
            the solver compensates their errors and activations have no more bits: these are what is left to learn from.
        adaptive: Cayley Adam instead of Cayley SGD.
        holdout: share of the samples held out, at most 32; the parameters that serve them best are kept.
        seed: of starts and of the order of samples.
        store: a .safetensors file for what is learned: read instead of training if it is there, else written.
        device: torch's name of where to train: "cpu", "cuda".
    """

    steps: int = 100
    seconds: float | None = None
    samples: int = 64
    batch: int = 2
    rotation_rate: float = 0.002
    rate: float = 0.005
    loss: str = "auto"
    blockwise: bool = False
    span: int = 1
    clip: bool = True
    clip_weights: bool = False
    round_weights: bool | None = None
    adaptive: bool = True
    holdout: float = 0.1
    seed: int = 0
    device: str = "cpu"
    store: str = ""

    def __post_init__(self) -> None:
        for option in ("steps", "samples", "batch", "span"):
            if getattr(self, option) < 1:
                raise RecipeError(f"{self.name}: {option} must be at least 1, got {getattr(self, option)}")
        if self.seconds is not None and not self.seconds > 0:
            raise RecipeError(f"{self.name}: seconds must be positive, got {self.seconds}")
        if not 0 <= self.holdout < 1:
            raise RecipeError(f"{self.name}: holdout must be at least 0 and below 1, got {self.holdout}")

    @abstractmethod
    def build(self, context: Context, program: Program, rng: np.random.Generator) -> None:
        """Give ``program`` its freedoms, mixings and shifts."""

    def apply(self, context: Context) -> Spaces:
        """Train and fold.

        Raises:
            CalibrationError: there are no calibration samples.
            RecipeError: torch is not installed or has no such device.
        """
        feeds = list(context.data.feeds)
        if not feeds:
            raise CalibrationError(
                f"{self.name} learns from calibration samples, and there are none; give `calibration` (`--calibration`)"
            )
        program = self.program(context)
        if not program.sites:
            context.report.entries.append(Entry(self.name, -1, False, "no linear operator is quantized"))
            return context.spaces
        chosen = np.linspace(0, len(feeds) - 1, min(self.samples, len(feeds))).astype(int)
        if self.store and Path(self.store).exists():
            text = self._read(program)
        else:
            text = self._train(program, context, [feeds[i] for i in chosen])
            self._write(program)
        parts = [f"{len(program.freedoms)} spaces", f"{len(program.mixings)} operators at run time"]
        parts += [f"{len(program.shifts)} shifts"] if program.shifts else []
        context.report.entries.append(Entry(self.name, -1, True, f"{', '.join(parts)}; {text}"))
        return analyse(program.finish())

    def program(self, context: Context) -> Program:
        """The model with everything this method learns, before training."""
        try:
            import torch
        except ImportError:
            raise RecipeError(f"{self.name} needs torch; install qcompile[torch]") from None
        from qcompile.passes.learn.program import Program

        try:
            like = torch.zeros((), dtype=torch.float32, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"{self.name}: device {self.device!r}: {str(error).splitlines()[0]}") from None
        program = Program(context, like)
        program.simulate = (True, self.round_weights is not False)
        program.compensated = bool(self.round_weights)
        self.build(context, program, np.random.default_rng(self.seed))
        if self.clip:
            program.clip_activations(context.data.feeds[0])
        if self.clip_weights and self.round_weights is not False:
            program.clip_weights(0.98)
        return program

    def _write(self, program: Program) -> None:
        from safetensors.torch import save_file

        if self.store:
            save_file({k: t.detach().cpu().contiguous() for k, t in program.parameters().items()}, self.store)

    def _read(self, program: Program) -> str:
        """Take the parameters from the file.

        Raises:
            RecipeError: it cannot be read, or is of another model or method.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            known = load_file(self.store)
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"{self.name}: {self.store} cannot be read: {error}") from None
        wanted = program.parameters()
        if {k: t.shape for k, t in known.items()} != {k: t.shape for k, t in wanted.items()}:
            raise RecipeError(f"{self.name}: {self.store} was learned by another method or on another model; remove it")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(known[name])
        return f"read from {self.store}"

    def _train(self, program: Program, context: Context, feeds: list) -> str:
        from qcompile.passes.blocks import blocks
        from qcompile.passes.learn.training import Schedule, train, train_blocks

        schedule = Schedule(
            self.steps,
            self.seconds,
            self.batch,
            self.rotation_rate,
            self.rate,
            self.adaptive,
            self.seed,
            self.holdout,
        )
        stage = context.data.stage or silent
        if not self.blockwise:
            return str(train(program, feeds, schedule, self.loss, stage, self.name))
        parts = blocks(context.model, program.sites.keys(), self.span)
        outcomes = train_blocks(program, feeds, parts, schedule, stage, self.name)
        before, after = (float(np.mean([getattr(o, k) for o in outcomes])) for k in ("before", "after"))
        return f"{len(outcomes)} blocks, mean loss {before:.4g} -> {after:.4g}"


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator:
    """A stage that shows nothing."""
    yield lambda note="": None
