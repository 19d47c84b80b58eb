"""Attention with quantized scores on one CUDA device against torch's over float16, for prefill.

    python benchmarks/cuda_attention.py --prepare                 without a GPU: generate the sources
    python benchmarks/cuda_attention.py [--out results.jsonl]     measure

32 query heads, 8 key heads of 128 channels, causal. The kernel alone, and the function that quantizes its operands first;
the relative error is that against float16 attention, for normal keys with a mean.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from qcompile.codegen.kernels.cuda import build, quantized_attention
from qcompile.codegen.kernels.cuda.quantized_attention import CudaQuantizedAttention
from qcompile.targets.cuda import TARGETS

HEADS, KV_HEADS, SIZE = 32, 8, 128
SHAPES = ((1, 1024), (1, 4096), (4, 4096), (1, 16384))
"""Sequences, tokens."""

KERNELS = {
    f"{scores}_{values}": CudaQuantizedAttention(HEADS, KV_HEADS, SIZE, SIZE, SIZE**-0.5, scores, values, True)
    for scores in ("int8", "int4", "binary")
    for values in ("float16", "e4m3")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = TARGETS[args.arch]
    sources = {name: quantized_attention.source({"attention": kernel}, target) for name, kernel in KERNELS.items()}
    if args.prepare:
        print(*sources.values(), sep="\n")
        return
    import torch

    from qcompile import kernels
    from qcompile.codegen.kernels.cuda.measure import append, measure

    print("device", torch.cuda.get_device_name(), "torch", torch.__version__)
    for batch, length in SHAPES:
        q = torch.randn(batch, HEADS, length, SIZE, device="cuda", dtype=torch.float16)
        k = torch.randn(batch, KV_HEADS, length, SIZE, device="cuda", dtype=torch.float16) + 2
        v = torch.randn(batch, KV_HEADS, length, SIZE, device="cuda", dtype=torch.float16)
        torch_call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True
        )
        want, sdpa = torch_call().float(), measure([torch_call] * 2, 5)
        flops = 2 * batch * HEADS * length * length * SIZE
        for name, kernel in KERNELS.items():
            function = build.load(build.compile_library(sources[name], target))["attention"]
            operands = [
                *kernels._token_codes(q, kernel.scores, False, target),
                *kernels._token_codes(k, kernel.scores, True, target),
                *kernels._values(v, kernel.values),
            ]
            y = torch.empty(batch, length, HEADS * SIZE, device="cuda", dtype=torch.float16)
            call = functools.partial(function, *operands, y)
            own = measure([call] * 2, 5)
            whole = functools.partial(kernels.attention, q, k, v, kernel.scores, kernel.values, True)
            got = whole().float()
            row = {
                "kernel": name, "batch": batch, "tokens": length, "us": own * 1e6, "whole_us": measure([whole] * 2, 5) * 1e6,
                "sdpa_us": sdpa * 1e6, "error": float((got - want).norm() / want.norm()),
            }  # fmt: skip
            print(
                f"{name:16s} {batch} x {length:5d}  own {own * 1e6:9.1f} us {flops / own / 1e12:5.0f} TOP/s  quantized first "
                f"{row['whole_us']:9.1f}  sdpa {sdpa * 1e6:9.1f} us  error {row['error']:.3f}",
                flush=True,
            )
            append(args.out, row)


if __name__ == "__main__":
    main()
