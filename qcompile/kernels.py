"""Single quantized layers for PyTorch on CUDA: pack once, call like `torch.nn.Linear`.

    layer = qcompile.kernels.linear(module.weight, "int4/g128")
    y = layer(x)                                      # (..., K) -> (..., N)

A layer holds one library with kernels for few and for many rows; the op ``qcompile::linear`` picks one by the number of
rows. It launches on torch's current stream, allocates only through torch,
may be captured in a CUDA graph, and has a fake kernel, so that `torch.compile` keeps it as one node.

A layer must not run on two streams at the same time: its counters of finished blocks are shared between calls.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.codegen.kernels.base import Epilogue, LinearProblem
from qcompile.codegen.kernels.cuda import build, quantized_attention, rowwise
from qcompile.codegen.kernels.cuda.linear import FLOAT8, Float8Activation
from qcompile.codegen.kernels.cuda.plan import ROWS, Entry, Plan, family, make_plan
from qcompile.codegen.kernels.cuda.quantized_attention import CudaQuantizedAttention
from qcompile.codegen.kernels.cuda.rowwise import MOST_COLUMNS, CudaRowwise
from qcompile.errors import InputError, TargetError
from qcompile.formats import ActivationFormat, Format, Quantized, parse_activation, parse_format
from qcompile.targets.cuda import TARGETS, CudaTarget, for_capability

__all__ = ["ROWS", "Plan", "QuantizedLinear", "attention", "linear", "plan", "quantize_rows"]


def plan(
    k: int,
    n: int,
    format: Format | str,
    activation_format: ActivationFormat | str = "none",
    dtype: torch.dtype = torch.float16,
    target: CudaTarget | str = "sm_90a",
    bias: bool = False,
    rows: Sequence[int] = ROWS,
    configs: Mapping[int, Mapping[str, Any]] | None = None,
) -> Plan:
    """Choose kernels for a ``(K, N)`` matrix; needs neither GPU nor TVM. See `make_plan`.

    Raises:
        TargetError: no family takes the format on this target.
    """
    fmt = parse_format(format) if isinstance(format, str) else format
    act = _activation(activation_format) if isinstance(activation_format, str) else activation_format
    chip = TARGETS[target] if isinstance(target, str) else target
    if dtype not in (torch.float16, torch.bfloat16):
        raise TargetError(f"CUDA layers take float16 or bfloat16 activations, not {dtype}")
    problem = LinearProblem(k, n, fmt, act, Epilogue(bias=bias))
    out = str(dtype).removeprefix("torch.")
    return make_plan(problem, chip, out, out, rows, configs)


def _activation(spelling: str) -> ActivationFormat:
    return Float8Activation() if spelling in ("e4m3/token", "fp8/token") else parse_activation(spelling)


@functools.cache
def _launcher(description: str) -> tuple[LinearProblem, list[tuple[Entry, Any]]]:
    """Problem, and the entries with their functions; generates and compiles what is not in the cache."""
    spec = json.loads(description)
    problem = LinearProblem(
        spec["k"],
        spec["n"],
        parse_format(spec["weight"]),
        _activation(spec["activation"]),
        Epilogue(**spec["epilogue"]),
    )
    entries = tuple(Entry(**entry) for entry in spec["entries"])
    module = build.load(Plan(problem, entries, TARGETS[spec["target"]]).library())
    return problem, [(entry, module[entry.symbol]) for entry in entries]


def quantize_rows(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """``(M, K)`` to codes of ``bits`` bits, int8 ``(M, K)``, and float32 scales ``(M,)``: ``max|row| / (2^(bits-1) - 1)``,
    round to nearest even."""
    top = (1 << bits - 1) - 1
    largest = x.abs().amax(-1).float()
    scale = largest / largest.new_full((), top)  # by a plain number, torch would multiply with its inverse
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x.float() / scale[:, None]).clamp_(-top, top).to(torch.int8), scale


def quantize_rows_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(M, K)`` to e4m3 ``(M, K)`` and float32 scales ``(M,)``: ``max|row| / 448``."""
    scale = x.abs().amax(-1).float() / 448
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.float() / scale[:, None]).clamp_(-448, 448).to(torch.float8_e4m3fn), scale


def quantizer(width: int, bits: int, dtype: torch.dtype) -> CudaRowwise | None:
    """The row kernel that does what `quantize_rows` does, bit for bit; None for rows it does not take."""
    if width > MOST_COLUMNS:
        return None
    return CudaRowwise(width, quantize="token", bits=bits, dtype=str(dtype).removeprefix("torch."))


def quantizer_source(kernel: CudaRowwise, target: CudaTarget) -> Path:
    """Its cached source."""
    return rowwise.source({"quantize": kernel}, target)


def _quantizer_library(kernel: CudaRowwise, target: CudaTarget) -> Path:
    return build.compile_library(quantizer_source(kernel, target), target)


@torch.library.custom_op("qcompile::quantize_rows", mutates_args=())
def _quantize(x: torch.Tensor, bits: int, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = quantizer(x.shape[1], bits, x.dtype)
    if kernel is None:
        return quantize_rows(x, bits)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if len(x):
        x = x.contiguous()
        x = x.clone() if x.data_ptr() % 16 else x
        build.load(_quantizer_library(kernel, TARGETS[target]))["quantize"](x, codes, scale)
    return codes, scale


@_quantize.register_fake
def _(x: torch.Tensor, bits: int, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


@torch.library.custom_op("qcompile::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    packed: list[torch.Tensor],
    arrived: torch.Tensor,
    description: str,
) -> torch.Tensor:
    problem, kernels = _launcher(description)
    m = x.shape[0]
    entry, function = next((k for k in kernels if k[0].rows >= m), kernels[-1])
    shape = family(entry.family).shape(problem, entry.config)
    out = torch.empty((m, problem.n), device=x.device, dtype=getattr(torch, entry.config["out"]))
    if x.shape[1] != shape.x_width:
        # Padding does not know e4m3; a zero has the same bits in all types.
        plain = x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x
        x = torch.nn.functional.pad(plain, (0, shape.x_width - x.shape[1])).view(x.dtype)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    # Kernels count elements in 32 bits.
    most = (1 << 31) // max(shape.x_width, problem.n) // 4096 * 4096 or 4096
    for start in range(0, m, most):
        rows = min(most, m - start)
        elements, counters = family(entry.family).scratch(problem, entry.config, rows)
        if counters > arrived.numel():
            arrived = torch.zeros(counters, dtype=torch.int32, device=x.device)
        partial = torch.empty(elements, dtype=torch.float32, device=x.device)
        scales = [] if scale is None else [scale[start : start + rows]]
        function(x[start : start + rows], *scales, *packed, partial, arrived, out[start : start + rows])
    return out


@_linear.register_fake
def _(x: torch.Tensor, scale: Any, packed: Any, arrived: Any, description: str) -> torch.Tensor:
    spec = json.loads(description)
    return x.new_empty((x.shape[0], spec["n"]), dtype=getattr(torch, spec["entries"][0]["config"]["out"]))


class QuantizedLinear(torch.nn.Module):
    """``y = x W + b`` with packed weights; made by `linear`. ``x`` is ``(..., K)``, on the device of the weights."""

    def __init__(self, plan: Plan, weight: Quantized, bias: np.ndarray | None = None) -> None:
        super().__init__()
        self.plan = plan
        packed = plan.pack(weight)
        self.names = list(packed)
        for name, array in packed.items():
            self.register_buffer(name, torch.from_numpy(array))
        if bias is not None:
            self.register_buffer("bias", torch.from_numpy(np.ascontiguousarray(bias, np.float32)))
            self.names.append("bias")
        counters = max(family(e.family).scratch(plan.problem, e.config, 4096)[1] for e in plan.entries)
        self.register_buffer("arrived", torch.zeros(counters, dtype=torch.int32), persistent=False)
        self._description = json.dumps(plan.describe())

    def prepare(self) -> QuantizedLinear:
        """Generate and compile the kernels now rather than at the first call."""
        self.plan.library()
        activation, entry = self.plan.problem.activation, self.plan.entries[0]
        if activation.bits and self.plan.shape().dtype != FLOAT8:
            dtype = getattr(torch, entry.config["out"])
            kernel = quantizer(self.plan.problem.k, activation.bits, dtype)
            if kernel is not None:
                _quantizer_library(kernel, self.plan.target)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.plan.problem.k:
            raise InputError(f"this layer takes (..., {self.plan.problem.k}), got {tuple(x.shape)}")
        flat = x.reshape(-1, x.shape[-1])
        scale = None
        if self.plan.problem.activation.bits:
            if self.plan.shape().dtype == FLOAT8:
                flat, scale = quantize_rows_float8(flat)
            else:
                bits, chip = self.plan.problem.activation.bits, self.plan.target.cpu
                flat, scale = torch.ops.qcompile.quantize_rows(flat, bits, chip)
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
        format: ``int2``, ``int3``, ``int4`` or ``int8``, ``/g32``, ``/g64``, ``/g128`` .. or per channel, ``/asym``; ``nf4``,
            ``fp4``, ``mxfp4``, ``nvfp4``, ``codebook4``, ``fp8``; ``dual4/g128`` with integer activations.
        activation_format: ``none``; ``int8/token`` (dynamic), or fewer bits; ``e4m3/token`` for weights that e4m3 represents.
        bias: float ``(N,)``.
        dtype: of activations and results, float16 (default unless ``weight`` is bfloat16) or bfloat16.
        target: architecture; that of torch's current device by default.

    Raises:
        TargetError: no kernel for it, no device to ask for its architecture, or nvcc is missing (at `prepare`).
        FormatError: the format is unknown.
    """
    fmt = parse_format(format) if isinstance(format, str) else format
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


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: str = "int8",
    values: str = "float16",
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention with quantized scores, for prefill: quantizes float operands and calls the kernel.

    Args:
        q: ``(B, heads, L, d)``, float16 or bfloat16. k, v: ``(B, kv_heads, S, d)`` and ``(B, kv_heads, S, dv)``.
        scores: ``int8``, ``int4`` or ``binary`` codes of queries and keys, a scale per token.
        values: ``float16`` or ``e4m3``, the latter with a scale per channel.
        causal: query i attends keys up to i.
        scale: of scores, by default ``1 / sqrt(d)``.

    Returns:
        ``(B, heads, L, dv)`` in the type of ``q``.

    Raises:
        InputError: operands do not fit each other, are no 16-bit floats, or not on a CUDA device.
        TargetError: heads of this size have no kernel.
    """
    _check_operands(q, k, v)
    batch, heads, length, d = q.shape
    out = str(q.dtype).removeprefix("torch.")
    kernel = CudaQuantizedAttention(
        heads, k.shape[1], d, v.shape[3], d**-0.5 if scale is None else scale, scores, values, causal, out
    )
    chip = TARGETS[for_capability(*torch.cuda.get_device_capability(q.device)).cpu]
    y = torch.empty(batch, length, heads * v.shape[3], device=q.device, dtype=q.dtype)
    operands = [*_token_codes(q, scores, False, chip), *_token_codes(k, scores, True, chip), *_values(v, values)]
    _attention_function(kernel, chip.cpu)(*operands, y)
    return y.view(batch, length, heads, v.shape[3]).transpose(1, 2)


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"{name} must be float16 or bfloat16 of four axes, not {x.dtype} of {tuple(x.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise InputError(f"q (B, heads, L, d), k (B, kv_heads, S, d) and v (B, kv_heads, S, dv) do not fit: {shapes}")
    if any(x.device.type != "cuda" or x.device != q.device for x in (q, k, v)):
        devices = ", ".join(str(x.device) for x in (q, k, v))
        raise InputError(f'q, k and v must be on one CUDA device, they are on {devices}; move them with .to("cuda")')


@functools.cache
def _attention_function(kernel: CudaQuantizedAttention, target: str) -> Any:
    chip = TARGETS[target]
    return build.load(build.compile_library(quantized_attention.source({"attention": kernel}, chip), chip))["attention"]


def _token_codes(x: torch.Tensor, scores: str, centred: bool, chip: CudaTarget) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of all tokens and their scales."""
    if scores == "binary":
        bits = ((x >= 0).view(*x.shape[:-1], -1, 8) * _bit_weights(x.device)).sum(-1, dtype=torch.uint8)
        return bits.view(torch.int8), x.float().abs().mean(-1)
    if centred:
        x = (x.float() - x.float().mean(2, keepdim=True)).to(x.dtype)
    codes, scale = torch.ops.qcompile.quantize_rows(x.reshape(-1, x.shape[-1]), int(scores[3:]), chip.cpu)
    return codes.view(x.shape), scale.view(x.shape[:-1])


@functools.cache
def _bit_weights(device: torch.device) -> torch.Tensor:
    """On the device before a CUDA graph is captured that uses them."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


@functools.lru_cache(64)
def _key_order(count: int, device: torch.device) -> torch.Tensor:
    """On the device before a CUDA graph is captured that uses it."""
    return torch.from_numpy(quantized_attention.key_order(count)).to(device)


def _values(v: torch.Tensor, kind: str) -> list[torch.Tensor]:
    if kind == "float16":
        return [v.half().contiguous()]
    scale = v.abs().amax(2).float() / 448
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (v.float() / scale[:, :, None]).to(torch.float8_e4m3fn).view(torch.int8)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % 64))
    return [codes[:, :, _key_order(codes.shape[2], v.device)].transpose(2, 3).contiguous(), scale]
