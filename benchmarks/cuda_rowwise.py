"""Row kernels on one CUDA device: online rotation or Kronecker product with the activation quantizer, against a copy of the tensor.

    python benchmarks/cuda_rowwise.py --prepare                 without a GPU: generate the sources
    python benchmarks/cuda_rowwise.py [--out results.jsonl]     measure
    python benchmarks/cuda_rowwise.py --candidates              measure clusters that might be chosen

A float16 tensor is read and int8 codes (of 8 or 4 bits) are written; `copy` reads and writes the float16 tensor, by torch.
Kronecker products are also compared with torch: two products of float16 matrices, then the quantizer as tensor operations, and as the row
kernel that only quantizes (`torch+`). All are replayed from CUDA graphs over tensors that together leave the second-level cache.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.codegen.kernels.cuda import build, rowwise
from qcompile.codegen.kernels.cuda.kronecker import shared_config
from qcompile.codegen.kernels.cuda.rotation import RotationConfig
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, SpreadConfig
from qcompile.kernels import quantize_rows
from qcompile.passes.learn.mixing import balanced
from qcompile.targets.cuda import TARGETS

if TYPE_CHECKING:
    import torch

WIDTHS = {4096: 4096, 8192: 8192, 11008: 256, 14336: 14336, 28672: 28672}
"""Orders of the Hadamard blocks by width; no order above 256 that divides 11008 is known."""

ROWS = (1, 4, 16, 64, 256, 1024, 4096)

KERNELS = (
    {
        f"hadamard{width}_int{bits}": CudaRowwise(width, hadamard=order, quantize="token", bits=bits, dtype="float16")
        for width, order in WIDTHS.items()
        for bits in (4, 8)
    }
    | {
        f"rms{width}_int8": CudaRowwise(width, norm="rms", gamma=True, quantize="token", dtype="float16")
        for width in (4096, 8192)
    }
    | {
        f"kronecker{width}_int{bits}": CudaRowwise(
            width, kronecker=balanced(width), quantize="token", bits=bits, dtype="float16"
        )
        for width in WIDTHS
        for bits in (4, 8)
    }
)

GATHERED = {"ahead": True, "gathered": True}

CANDIDATES = (
    {
        f"hadamard{width}_by{blocks}_{warps}" + "_staged" * staged: CudaRowwise(
            width,
            hadamard=width,
            quantize="token",
            dtype="float16",
            config=RotationConfig(warps, held, blocks=blocks, staged=staged, **GATHERED),
        )
        for width, divisions in {
            4096: ((1, 2, 8), (8, 1, 2), (4, 1, 2)),
            8192: ((1, 4, 8), (8, 2, 2), (4, 2, 2), (8, 1, 4), (4, 1, 4)),
            14336: ((7, 1, 8), (4, 1, 8), (14, 1, 4), (7, 1, 4), (14, 1, 2)),
            28672: ((7, 1, 8), (5, 1, 8), (4, 1, 8), (14, 1, 4), (7, 1, 4), (14, 2, 2)),
        }.items()
        for warps, held, blocks in divisions
        for staged in (False, True)
    }
    | {
        f"kronecker{width}_shared": CudaRowwise(
            width,
            kronecker=balanced(width),
            quantize="token",
            dtype="float16",
            config=shared_config(width, balanced(width), TARGETS["sm_90a"], True),
        )
        for width in WIDTHS
    }
    | {
        f"rms{width}_by{blocks}": CudaRowwise(
            width, norm="rms", gamma=True, quantize="token", dtype="float16", config=SpreadConfig(blocks)
        )
        for width in (4096, 8192)
        for blocks in (1, 2, 4, 8)
    }
    | {
        f"quantize{width}_by{blocks}": CudaRowwise(
            width, quantize="token", dtype="float16", config=SpreadConfig(blocks)
        )
        for width in (4096, 8192, 14336, 28672)
        for blocks in (1, 2, 4, 8)
    }
)
"""Configs of clusters to choose from, for few rows."""

QUANTIZERS = {
    f"quantize{width}_int{bits}": CudaRowwise(width, quantize="token", bits=bits, dtype="float16")
    for width in WIDTHS
    for bits in (4, 8)
}

COPIES = {f"copy{width}": CudaRowwise(width, dtype="float16", out="float16") for width in WIDTHS}
"""Row kernels that do nothing but read and write: launched and scheduled like the others."""


def by_torch(matrices: list[torch.Tensor], quantize: Callable[[torch.Tensor], object], x: torch.Tensor) -> object:
    """``x @ (left (x) right)`` in two products, quantized."""
    import torch

    left, right = matrices
    products = torch.matmul(left.T, torch.matmul(x.view(-1, len(left), len(right)), right))
    return quantize(products.view(x.shape))


def _into(function: Callable[..., object], codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    function(x, codes, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--candidates", action="store_true", help="measure `CANDIDATES` instead, up to 64 rows")
    parser.add_argument("--only", default="", help="beginning of the names of kernels to measure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = TARGETS[args.arch]
    measured = CANDIDATES if args.candidates else KERNELS
    source = rowwise.source(measured | QUANTIZERS | COPIES, target)
    if args.prepare:
        print(source)
        return
    import torch

    from qcompile.codegen.kernels.cuda.measure import CACHE, LEAST, append, measure

    module = build.load(build.compile_library(source, target))
    print("device", torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, kernel in measured.items():
        for m in (r for r in ROWS if name.startswith(args.only) and r <= (64 if args.candidates else ROWS[-1])):
            count = max(2, -(-CACHE // (m * kernel.width * 2))) if m >= 256 else 64
            xs = [torch.randn(m, kernel.width, device="cuda", dtype=torch.float16) for _ in range(count)]
            gamma = [torch.rand(kernel.width, device="cuda")] if kernel.gamma else []
            codes = [torch.empty(m, kernel.width, device="cuda", dtype=torch.int8) for _ in range(count)]
            scale, y = torch.empty(m, device="cuda"), [torch.empty_like(x) for x in xs]
            matrices = [torch.randn(n, n, device="cuda", dtype=torch.float16) / n**0.5 for n in kernel.kronecker if n]
            packed = kernel.mixed.pack(*(a.float().cpu().numpy() for a in matrices)) if matrices else {}
            operands = [*gamma, *(torch.from_numpy(a.view("f4")).cuda().view(torch.uint32 if a.dtype == "u4" else torch.float32)
                                  for a in packed.values())]  # fmt: skip
            own = measure([functools.partial(module[name], x, *operands, c, scale) for x, c in zip(xs, codes)])
            copy = measure([functools.partial(b.copy_, x) for x, b in zip(xs, y)])
            same = module[f"copy{kernel.width}"]
            plain = measure([functools.partial(same, x, b) for x, b in zip(xs, y)])
            row = {"kernel": name, "m": m, "us": own * 1e6, "copy_us": copy * 1e6, "row_copy_us": plain * 1e6,
                   "ratio": own / copy, "row_ratio": own / plain}  # fmt: skip
            peers = ""
            if matrices:
                own_quantizer = functools.partial(
                    _into, module[f"quantize{kernel.width}_int{kernel.bits}"], codes[0], scale
                )
                plain, fused = (
                    measure([functools.partial(by_torch, matrices, quantize, x) for x in xs[:LEAST]])
                    for quantize in (functools.partial(quantize_rows, bits=kernel.bits), own_quantizer)
                )
                row |= {"torch_us": plain * 1e6, "torch_fused_us": fused * 1e6}
                peers = (
                    f"  torch {plain * 1e6:8.2f} us {plain / own:.2f}  torch+ {fused * 1e6:8.2f} us {fused / own:.2f}"
                )
            print(
                f"{name:20s} m {m:5d}  own {own * 1e6:8.2f} us  copy {copy * 1e6:8.2f} us {own / copy:.2f}  "
                f"row kernel that copies {row['row_copy_us']:8.2f} us {row['row_ratio']:.2f}{peers}",
                flush=True,
            )
            append(args.out, row)


if __name__ == "__main__":
    main()
