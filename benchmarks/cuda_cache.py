"""Attention of one new token over a quantized cache on one CUDA device, against torch over a float16 cache.

    python benchmarks/cuda_cache.py --prepare                 without a GPU: generate the source
    python benchmarks/cuda_cache.py [--out results.jsonl]     measure

32 query heads, 8 key heads, 128 channels. ``sdpa`` is torch's scaled_dot_product_attention with grouped queries.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from qcompile.codegen.kernels.cuda import build, cache
from qcompile.codegen.kernels.cuda.cache import CudaCacheAttention
from qcompile.targets.cuda import TARGETS

HEADS, KV_HEADS, SIZE = 32, 8, 128
CASES = ((1, 4096), (1, 32768), (16, 4096))
"""Sequences and tokens of each."""

KERNELS = {
    f"int{bits}_{splits}": CudaCacheAttention(HEADS, KV_HEADS, SIZE, bits, SIZE**-0.5, splits)
    for bits in (8, 4, 2)
    for splits in (8, 32)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a", choices=list(TARGETS))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = TARGETS[args.arch]
    source = cache.source(KERNELS, target)
    if args.prepare:
        print(source)
        return
    import torch

    from qcompile.codegen.kernels.cuda.measure import CACHE, append, measure

    module = build.load(build.compile_library(source, target))
    print("device", torch.cuda.get_device_name(), "torch", torch.__version__)
    for batch, tokens in CASES:
        q = torch.randn(batch, HEADS, SIZE, device="cuda", dtype=torch.float16)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
        copies = max(2, -(-CACHE // (batch * KV_HEADS * tokens * SIZE)))
        shape = (batch, KV_HEADS, tokens, SIZE)
        floats = [[torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(copies)]

        def sdpa(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor = q) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        peer = measure([lambda k=k, v=v: sdpa(k, v) for k, v in floats])
        del floats
        for name, kernel in KERNELS.items():
            row = SIZE * kernel.bits // 8
            sets = []
            for _ in range(copies):
                codes = [torch.randint(0, 256, (*shape[:3], row), dtype=torch.uint8, device="cuda") for _ in range(2)]
                k_meta = torch.rand(batch, KV_HEADS, tokens // cache.TOKENS, 2, SIZE, device="cuda").half()
                v_meta = torch.rand(*shape[:3], 2, device="cuda").half()
                sets.append((codes[0], k_meta, codes[1], v_meta))
            parts = torch.empty(kernel.splits, batch, HEADS, SIZE + 2, device="cuda")
            y = torch.empty_like(q)

            def run(
                arrays: tuple[torch.Tensor, ...],
                first: Any = module[name],
                second: Any = module[f"{name}_merge"],
                fixed: tuple[torch.Tensor, ...] = (q, lengths, parts, y),
            ) -> None:
                query, counts, between, out = fixed
                first(query, *arrays, counts, between)
                second(between, out)

            own = measure([functools.partial(run, a) for a in sets])
            size = sum(a.numel() * a.element_size() for a in sets[0])
            row_ = {"kernel": name, "batch": batch, "tokens": tokens, "us": own * 1e6, "sdpa_us": peer * 1e6}
            print(
                f"{name:8s} {batch:3d} x {tokens:5d}  own {own * 1e6:8.2f} us {size / own / 1e12:.2f} TB/s  "
                f"sdpa float16 {peer * 1e6:8.2f} us",
                flush=True,
            )
            append(args.out, row_)


if __name__ == "__main__":
    main()
