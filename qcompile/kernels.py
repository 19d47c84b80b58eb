"""Single quantized layers for PyTorch on CUDA: pack once, call like `torch.nn.Linear`.

    layer = qcompile.kernels.linear(module.weight, "int4/g128")
    y = layer(x)                                      # (..., K) -> (..., N)

A layer holds one library with kernels for up to 8, 16, 32 and 64 rows (more rows are several blocks of 64); the op
``qcompile::linear`` picks one by the number of rows. It launches on torch's current stream, allocates only through torch,
may be captured in a CUDA graph, and has a fake kernel, so that `torch.compile` keeps it as one node.

A layer must not run on two streams at the same time: its counters of finished blocks are shared between calls.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cuda import FAMILIES, build, tuned
from qcompile.codegen.kernels.cuda.stream import StreamLinear
from qcompile.errors import FormatError, InputError, TargetError
from qcompile.formats import ActivationFormat, Format, IntFormat, Quantized, parse_activation, parse_format
from qcompile.targets.cuda import TARGETS, CudaTarget, for_capability

__all__ = ["QuantizedLinear", "linear", "plan", "quantize_rows"]

ROWS = (8, 16, 32, 64)
"""Rows the kernels of a layer are written for."""


@dataclass(frozen=True)
class Plan:
    """The kernels of a layer: one config per entry of `ROWS`, in one library."""

    family: StreamLinear
    problem: LinearProblem
    configs: tuple[dict[str, Any], ...]
    target: CudaTarget

    def describe(self) -> dict[str, Any]:
        """Everything the generated code depends on, JSON-serialisable."""
        p = self.problem
        return {
            "target": self.target.cpu,
            "family": self.family.name,
            "k": p.k,
            "n": p.n,
            "weight": str(p.weight),
            "activation": str(p.activation),
            "epilogue": asdict(p.epilogue),
            "configs": list(self.configs),
        }

    def source(self) -> Path:
        """The CUDA source; generated with TVM unless it is in the cache."""

        def make() -> dict[str, Any]:
            names = [f"rows{8 * c['mt']}" for c in self.configs]
            return {n: self.family.build(self.problem, c, self.target, n) for n, c in zip(names, self.configs)}

        return build.source(self.describe(), make, self.target)

    def library(self) -> Path:
        """The compiled library; see `build.compile_library` for errors."""
        return build.compile_library(self.source(), self.target)


def plan(
    k: int,
    n: int,
    format: Format | str,
    activation_format: ActivationFormat | str = "none",
    dtype: torch.dtype = torch.float16,
    target: CudaTarget | str = "sm_90a",
    bias: bool = False,
    configs: dict[int, dict[str, Any]] | None = None,
) -> Plan:
    """Choose kernels for a ``(K, N)`` matrix; needs neither GPU nor TVM.

    Args:
        configs: by rows (an entry of `ROWS`), config entries to use instead of the tuned or expected best ones.

    Raises:
        TargetError: no family takes the format on this target.
    """
    fmt = parse_format(format) if isinstance(format, str) else format
    act = parse_activation(activation_format) if isinstance(activation_format, str) else activation_format
    chip = TARGETS[target] if isinstance(target, str) else target
    if dtype not in (torch.float16, torch.bfloat16):
        raise TargetError(f"CUDA layers take float16 or bfloat16 activations, not {dtype}")
    problem = LinearProblem(k, n, fmt, act, Epilogue(bias=bias))
    reasons = []
    for family in (cls() for cls in FAMILIES):
        if support := family.supports(problem, chip):
            break
        reasons.append(support.reason)
    else:
        raise TargetError(
            f"no CUDA kernel multiplies {fmt} weights ({k} x {n}) by {act} activations: {'; '.join(reasons)}"
        )
    out = str(dtype).removeprefix("torch.")
    kind = "int8" if act.bits else out
    chosen = []
    for rows in ROWS:
        given = (configs or {}).get(rows, {})
        base = tuned.lookup(family, problem, chip, rows, kind)
        chosen.append({**base, **given, "out": out, "mt": rows // 8})
    return Plan(family, problem, tuple(chosen), chip)


@functools.cache
def _launcher(description: str) -> tuple[StreamLinear, LinearProblem, list[tuple[int, dict[str, Any], Any]]]:
    """Family, problem and (rows, config, function) of a layer; generates and compiles what is not in the cache."""
    spec = json.loads(description)
    family = next(cls() for cls in FAMILIES if cls.name == spec["family"])
    problem = LinearProblem(
        spec["k"],
        spec["n"],
        parse_format(spec["weight"]),
        parse_activation(spec["activation"]),
        Epilogue(**spec["epilogue"]),
    )
    module = build.load(Plan(family, problem, tuple(spec["configs"]), TARGETS[spec["target"]]).library())
    return family, problem, [(8 * c["mt"], c, module[f"rows{8 * c['mt']}"]) for c in spec["configs"]]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(M, K)`` to int8 codes ``(M, K)`` and float32 scales ``(M,)``: ``max|row| / 127``, round to nearest even."""
    scale = x.abs().amax(-1).float() / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x.float() / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


@torch.library.custom_op("qcompile::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    packed: list[torch.Tensor],
    arrived: torch.Tensor,
    description: str,
) -> torch.Tensor:
    family, problem, kernels = _launcher(description)
    m = x.shape[0]
    _, config, function = next((entry for entry in kernels if entry[0] >= m), kernels[-1])
    out = torch.empty((m, problem.n), device=x.device, dtype=getattr(torch, config["out"]))
    if m == 0:
        return out
    width = family.shape(problem, config).x_width
    if x.shape[1] != width:
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    elements, counters = family.scratch(problem, config, m)
    if counters > arrived.numel():
        arrived = torch.zeros(counters, dtype=torch.int32, device=x.device)
    partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    scales = [] if scale is None else [scale]
    function(x, *scales, *packed, partial, arrived, out)
    return out


@_linear.register_fake
def _(x: torch.Tensor, scale: Any, packed: Any, arrived: Any, description: str) -> torch.Tensor:
    spec = json.loads(description)
    return x.new_empty((x.shape[0], spec["n"]), dtype=getattr(torch, spec["configs"][0]["out"]))


class QuantizedLinear(torch.nn.Module):
    """``y = x W + b`` with packed weights; made by `linear`. ``x`` is ``(..., K)``, on the device of the weights."""

    def __init__(self, plan: Plan, weight: Quantized, bias: np.ndarray | None = None) -> None:
        super().__init__()
        self.plan = plan
        packed = plan.family.pack(plan.problem, plan.configs[0], weight)
        self.names = list(packed)
        for name, array in packed.items():
            self.register_buffer(name, torch.from_numpy(array))
        if bias is not None:
            self.register_buffer("bias", torch.from_numpy(np.ascontiguousarray(bias, np.float32)))
            self.names.append("bias")
        counters = max(plan.family.scratch(plan.problem, c, 4096)[1] for c in plan.configs)
        self.register_buffer("arrived", torch.zeros(counters, dtype=torch.int32), persistent=False)
        self._description = json.dumps(plan.describe())

    def prepare(self) -> QuantizedLinear:
        """Generate and compile the kernels now rather than at the first call."""
        self.plan.library()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.plan.problem.k:
            raise InputError(f"this layer takes (..., {self.plan.problem.k}), got {tuple(x.shape)}")
        flat = x.reshape(-1, x.shape[-1])
        scale = None
        if self.plan.problem.activation.bits:
            flat, scale = quantize_rows(flat)
        packed = [getattr(self, name) for name in self.names]
        y = torch.ops.qcompile.linear(flat, scale, packed, self.arrived, self._description)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def linear(
    weight: torch.Tensor | Quantized,
    format: Format | str = "int4/g128",
    activation_format: ActivationFormat | str = "none",
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    target: CudaTarget | str | None = None,
) -> QuantizedLinear:
    """Quantize and pack one linear layer.

    Args:
        weight: float ``(N, K)`` as in `torch.nn.Linear`, or an already quantized ``(K, N)`` matrix.
        format: ``int2``, ``int3``, ``int4`` or ``int8``, ``/g32``, ``/g64``, ``/g128`` .. or per channel, ``/asym``.
        activation_format: ``none``, or ``int8/token`` (dynamic; symmetric weights of 2, 4 or 8 bits).
        bias: float ``(N,)``.
        dtype: of activations and results, float16 (default unless ``weight`` is bfloat16) or bfloat16.
        target: architecture; that of torch's current device by default.

    Raises:
        TargetError: no kernel for it, no device to ask for its architecture, or nvcc is missing (at `prepare`).
        FormatError: the format is unknown or not an integer format.
    """
    fmt = parse_format(format) if isinstance(format, str) else format
    if not isinstance(fmt, IntFormat):
        raise FormatError(f"CUDA layers take integer formats, not {fmt}")
    if target is None:
        if not torch.cuda.is_available():
            raise TargetError(f"there is no CUDA device to ask for its architecture; name one of {', '.join(TARGETS)}")
        target = for_capability(*torch.cuda.get_device_capability())
    device = weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")
    if dtype is None:
        dtype = torch.bfloat16 if isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 else torch.float16
    quantized = weight if isinstance(weight, Quantized) else fmt.encode(weight.detach().T.float().cpu().numpy())
    k, n = quantized.codes.shape
    chosen = plan(k, n, fmt, activation_format, dtype, target, bias is not None)
    offset = None if bias is None else bias.detach().float().cpu().numpy()
    return QuantizedLinear(chosen, quantized, offset).to(device)
