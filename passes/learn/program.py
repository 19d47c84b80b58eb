"""A model as a differentiable function of learned elements, with the rounding of its linear operators simulated.

Per step: the freedoms make an element, the engine folds it into the constants (`passes/spaces/act.py`, the same code
that folds constants), weights of quantized readers are rounded, and samples run through the graph:

    parameters -> element -> folded constants -> rounded weights -> loss of each sample

The first three arrows do not depend on the samples. Samples therefore see detached copies of their results, whose
gradients add up over a batch, and one backward pass takes the sum to the parameters (`Step.backward`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompile.passes.asks.base import Context, Precision
from qcompile.passes.asks.online import insert_online, product_readers
from qcompile.passes.execute import run
from qcompile.passes.learn.freedoms import Freedom, Tensor
from qcompile.passes.learn.mixing import Mixing
from qcompile.passes.learn.rounding import round_tokens, round_weight
from qcompile.passes.quantize import CLIP
from qcompile.passes.spaces import Element, Spaces, fold
from qcompile.passes.spaces.act import Actor, Plans
from qcompile.passes.spaces.fold import constant_values, overwritten_entries
from qcompile.passes.spaces.translate import Translator

SHARES = [float(s) for s in np.linspace(0.5, 0.98, 25)]
"""Clipped shares to begin with, of which the best is taken."""


COLUMNS = 256
"""Output channels of an activation's readers that this looks at, about."""


@dataclass(frozen=True)
class Site:
    """One quantized product ``activation @ weight``."""

    node: str
    activation: str
    weight: str
    width: int
    precision: Precision

    @property
    def compensated(self) -> bool:
        """Whether errors of the weight are made up for, and those of the activation, as coarse as it, are what is left."""
        weight, activation = self.precision.weight, self.precision.activation
        coarse = activation is not None and activation.bits <= getattr(weight, "bits", 0)
        return self.precision.compensated and coarse


@dataclass
class Step:
    """Constants made from the parameters as they are now.

    Attributes:
        folded: constants of the graph by name.
        rounded: weight of each site by node name, as its product reads it.
        offsets: what each site adds to its result, ``(N,)``, by node name.
    """

    folded: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Step:
        """Leaves with the same values, for samples to read."""
        return Step(
            *(
                {k: t.detach().requires_grad_(t.requires_grad) for k, t in part.items()}
                for part in (self.folded, self.rounded, self.offsets)
            )
        )

    def backward(self, leaves: Step) -> None:
        """Take the gradients that samples left on ``leaves`` to the parameters."""
        pairs = [
            (mine[k], theirs[k].grad)
            for mine, theirs in zip(self._parts(), leaves._parts())
            for k in mine
            if theirs[k].grad is not None
        ]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

    def _parts(self) -> tuple[dict[str, Tensor], ...]:
        return self.folded, self.rounded, self.offsets


class Program:
    """The model of a context, with what is learned about it.

    Attributes:
        freedoms: parts of the element.
        mixings: operators at run time, by activation.
        shifts: ``(K,)`` translations, by activation.
        clips: logits of the clipped share of tokens, by activation.
        weight_clips: logits of the clipped share of weights, by weight.
        simulate: whether activations and weights are rounded.
        compensated: whether weights are rounded even where the solver compensates errors.
    """

    def __init__(self, context: Context, like: Tensor) -> None:
        self.spaces: Spaces = context.spaces
        self.model = context.model
        self.like = like
        self.freedoms: list[Freedom] = []
        self.mixings: dict[str, Mixing] = {}
        self.shifts: dict[str, Tensor] = {}
        self.clips: dict[str, Tensor] = {}
        self.weight_clips: dict[str, Tensor] = {}
        self.simulate = (True, True)
        self.compensated = True
        self.sites = {
            r.node: Site(r.node, r.activation, r.weight, len(r.channels), context.precision(r))
            for r in product_readers(context)
        }
        self._base: dict[str, Tensor] = {}
        self._gamma: dict[bytes, np.ndarray] = {}
        self._plans = Plans()
        self._moved: tuple[set[str], dict[str, np.ndarray]] | None = None
        self._frontier: list[str] | None = None

    # -- parameters --------------------------------------------------------------------------------------------------

    def clip_activations(self, feed: Mapping[str, Any]) -> None:
        """Learn the clipped share of every activation that is rounded per token.

        Begins with the share that has the least rounding error of the readers' outputs on the rows of one sample.
        """
        seen: dict[str, Tensor] = {}
        simulate, self.simulate = self.simulate, (False, False)
        readers: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            step = self.step()
            self.run(step, feed, self._results(), seen=seen)
            for site in self.sites.values():
                readers.setdefault(site.activation, []).append(step.rounded[site.node])
            for site in self.sites.values():
                fmt = site.precision.activation
                if fmt is not None and fmt.granularity == "token" and site.activation not in self.clips:
                    x, weight = seen[site.activation], torch.cat(readers[site.activation], -1)
                    weight = weight[:, :: max(1, weight.shape[1] // COLUMNS)]
                    errors = [float(((round_tokens(x, fmt, s) - x) @ weight).square().sum()) for s in SHARES]
                    start = logit(SHARES[int(np.argmin(errors))])
                    self.clips[site.activation] = self.like.new_tensor(start).requires_grad_()
        self.simulate = simulate

    def _results(self) -> list[str]:
        return [v.name or "" for v in self.model.graph.outputs]

    def clip_weights(self, start: float) -> None:
        """Learn the clipped share of every group of rounded weights."""
        for site in self.sites.values():
            fmt = site.precision.weight
            if fmt is not None:
                k, n = self._initializer(site.weight).const_value.numpy().shape
                shape = (fmt.groups(k), 1, n)
                self.weight_clips[site.weight] = self.like.new_full(shape, logit(start)).requires_grad_()

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self, names: Iterable[str] | None = None, nodes: Iterable[str] | None = None) -> Step:
        """Make the constants ``names`` and the weights of the sites ``nodes`` (all by default) from the parameters."""
        actor = self._actor()
        moved, overwritten = self._changes(actor)
        wanted = set(self.model.graph.initializers) if names is None else set(names)
        result = Step()
        for name in self.model.graph.initializers:
            if name in wanted and self._initializer(name).dtype.is_floating_point():
                base = self._constant(name)
                change = name in moved
                result.folded[name] = (
                    actor.transform(base, self.spaces.constants[name], overwritten.get(name)) if change else base
                )
        sites = self.sites.values() if nodes is None else [self.sites[n] for n in nodes]
        for site in sites:
            self._round(site, result)
        return result

    def _round(self, site: Site, result: Step) -> None:
        weight = result.folded[site.weight]
        if site.activation in self.shifts:
            result.offsets[site.node] = -self.shifts[site.activation] @ weight
        if site.activation in self.mixings:
            weight = self.mixings[site.activation].inverse(weight)
        if self.simulate[1] and site.precision.weight is not None and (self.compensated or not site.compensated):
            clip: Any = 1.0
            if site.weight in self.weight_clips:
                clip = torch.sigmoid(self.weight_clips[site.weight])
            weight = round_weight(weight, site.precision.weight, clip)
        result.rounded[site.node] = weight

    def run(
        self,
        step: Step | None,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        *,
        seen: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Execute the graph from ``inputs`` (of the graph, or inner values) to ``outputs``; in float without a step.

        ``seen`` receives the activations as the sites' products read them.
        """
        dtype = str(self.like.dtype).removeprefix("torch.")
        common = {"dtype": dtype, "device": self.like.device.type}
        if step is None:
            return run(self.model, inputs, list(outputs), constants=_Base(self), **common)

        def compute(node: ir.Node, args: list[Tensor]) -> Tensor | None:
            if node.name not in step.rounded:
                return None
            site = self.sites[node.name]
            x = self._input(site, args[0])
            if seen is not None:
                seen[site.activation] = x
            y = x @ step.rounded[site.node]
            return y + step.offsets[site.node] if site.node in step.offsets else y

        return run(self.model, inputs, list(outputs), constants=step.folded, compute=compute, **common)

    def prefix(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values that nothing learned reaches and something learned is combined with: masks, rotary tables."""
        if self._frontier is None:
            self._frontier = self._border()
        wanted = [name for name in self._frontier if name not in inputs]
        with torch.no_grad():
            dtype = str(self.like.dtype).removeprefix("torch.")
            return run(self.model, inputs, wanted, constants=_Base(self), dtype=dtype, device=self.like.device.type)

    def _border(self) -> list[str]:
        moved, _ = self._changes(self._actor())
        reached, border = set[str](), dict[str, None]()
        for node in self.model.graph:
            names = [v.name or "" for v in node.inputs if v is not None]
            if node.name not in self.sites and not any(n in reached or n in moved for n in names):
                continue
            reached.update(v.name or "" for v in node.outputs)
            border |= {
                v.name or "": None
                for v in node.inputs
                if v is not None and v.producer() is not None and v.name not in reached
            }
        return list(border)

    def _input(self, site: Site, x: Tensor) -> Tensor:
        """The activation as the site's product reads it."""
        if site.activation in self.shifts:
            x = x + self.shifts[site.activation]
        if site.activation in self.mixings:
            x = self.mixings[site.activation].forward(x)
        if self.simulate[0] and site.precision.activation is not None:
            clip: Any = 1.0
            if site.activation in self.clips:
                clip = torch.sigmoid(self.clips[site.activation])
            x = round_tokens(x, site.precision.activation, clip)
        return x

    def parameters(self) -> dict[str, Tensor]:
        """Everything that is learned, by a name that does not depend on the training."""
        parts = {f"{type(f).__name__} {f.space.index}": f.parameters for f in self.freedoms}
        parts |= {f"mixing {name}": m.parameters for name, m in self.mixings.items()}
        found = {f"{name} {i}": t for name, p in parts.items() for i, t in enumerate(p.all())}
        found |= {f"shift {name}": t for name, t in self.shifts.items()}
        return found | {f"clip {name}": t for name, t in self.clips.items()}

    # -- the end -----------------------------------------------------------------------------------------------------

    def element(self) -> Element:
        """What was learned, in float64."""
        element = self.spaces.identity()
        for freedom in self.freedoms:
            freedom.final(self.spaces, element)
        return element

    def finish(self) -> ir.Model:
        """Return the model with everything that was learned folded or inserted, computed in float64."""
        model = fold(self.spaces, self.element()) if self.freedoms else self.model.clone()
        if self.shifts:
            translator = Translator(self.spaces.rebase(model))
            for name, shift in self.shifts.items():
                translator.translate(name, shift.detach().cpu().double().numpy())
        readers: dict[str, list[str]] = {}
        for site in self.sites.values():
            readers.setdefault(site.activation, []).append(site.node)
        for name, mixing in self.mixings.items():
            insert_online(model, {name: readers[name]}, mixing.final())
        nodes = {node.name: node for node in model.graph}
        for name, clip in self.clips.items():
            for reader in readers[name]:
                value = nodes[reader].inputs[0]
                assert value is not None
                value.metadata_props[CLIP] = f"{float(torch.sigmoid(clip.detach())):.6f}"
        return model

    # -- constants ---------------------------------------------------------------------------------------------------

    def _actor(self) -> Actor:
        element = self.spaces.identity()
        for freedom in self.freedoms:
            freedom.learned(element)
        return Actor(element, self._gammas, self._plans)

    def _gammas(self, coordinates: np.ndarray) -> np.ndarray:
        key = coordinates.tobytes()
        if key not in self._gamma:
            self._gamma[key] = constant_values(self.spaces, coordinates)
        return self._gamma[key]

    def _changes(self, actor: Actor) -> tuple[set[str], dict[str, np.ndarray]]:
        """Constants the element moves. Which ones does not depend on the values of the parameters."""
        if self._moved is None:
            overwritten = overwritten_entries(self.spaces, actor)
            moved = {n for n, maps in self.spaces.constants.items() if any(actor.touches(m) for m in maps)}
            self._moved = moved | set(overwritten), overwritten
        return self._moved

    def _initializer(self, name: str) -> ir.Value:
        return self.model.graph.initializers[name]

    def _constant(self, name: str) -> Tensor:
        """A float constant of the model as it is, on the device."""
        if name not in self._base:
            array = self._initializer(name).const_value.numpy()
            array = array.astype(np.float64 if self.like.dtype == torch.float64 else np.float32)
            self._base[name] = torch.as_tensor(array, dtype=self.like.dtype, device=self.like.device)
        return self._base[name]

    def release(self, names: Iterable[str]) -> None:
        """Forget copies of constants."""
        for name in names:
            self._base.pop(name, None)


class _Base(Mapping):
    """The model's float constants, copied to the device when they are first read."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __getitem__(self, name: str) -> Tensor:
        return self.program._constant(name)

    def __contains__(self, name: object) -> bool:
        value = self.program.model.graph.initializers.get(str(name))
        return value is not None and value.dtype.is_floating_point()

    def __iter__(self):
        return iter(n for n in self.program.model.graph.initializers if n in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def logit(share: float) -> float:
    """Inverse of the logistic function."""
    return float(np.log(share / (1 - share)))
