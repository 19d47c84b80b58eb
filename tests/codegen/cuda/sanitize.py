"""``compute-sanitizer --tool racecheck python tests/codegen/cuda/sanitize.py [PART/PARTS]``: every kernel of the GPU tests on a
few rows, one launch each. Results are not looked at; the tests do that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from cases import ATTENTION, CACHES, CASES, QUANTIZED_ATTENTION, Case
from cases import rowwise as row_kernels

from qcompile.codegen.kernels.cuda import attention, build, cache, quantized_attention, rowwise
from qcompile.codegen.kernels.cuda.attention import CudaAttention
from qcompile.codegen.kernels.cuda.cache import CudaCacheAttention
from qcompile.codegen.kernels.cuda.quantized_attention import CudaQuantizedAttention
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise
from qcompile.formats import parse_format
from qcompile.kernels import QuantizedLinear
from qcompile.targets.cuda import TARGETS, CudaTarget, for_capability

ROWS = (1, 7, 16, 31, 64, 100, 200, 300)
"""One number for every bucket."""


def run_linear(case: Case, target: CudaTarget) -> None:
    weight = parse_format(case.weight).encode(np.random.default_rng(0).standard_normal((case.k, case.n)).astype("f4"))
    bias = np.ones(case.n, np.float32) if case.bias else None
    layer = QuantizedLinear(case.plan(target.cpu), weight, bias).cuda()
    for m in ROWS:
        layer(torch.randn(m, case.k, device="cuda", dtype=getattr(torch, case.dtype)))


def run_rowwise(name: str, kernel: CudaRowwise, target: CudaTarget) -> None:
    function = build.load(build.compile_library(rowwise.source(row_kernels(target), target), target))[name]
    d = kernel.width
    several = [v for _, v in kernel.variants(target) if v.transform and v.shares == 1]  # blocks with two rows
    for m in {3, *(v.resident * target.multiprocessors + 3 for v in several if d <= 4096)}:
        _run_rows(function, kernel, m)


def _run_rows(function: Callable[..., None], kernel: CudaRowwise, m: int) -> None:
    d = kernel.width
    x = torch.randn(m, d * (2 if kernel.gated else 1), device="cuda").to(getattr(torch, kernel.dtype))
    vectors = [torch.rand(d, device="cuda") for _ in range(kernel.gamma + kernel.beta + kernel.factor)]
    if kernel.mixed:
        packed = kernel.mixed.pack(*(np.eye(size, dtype=np.float32) for size in kernel.kronecker))
        vectors += [
            torch.from_numpy(a.view(np.int32)).cuda().view(getattr(torch, str(a.dtype))) for a in packed.values()
        ]
    if kernel.quantize == "tensor":
        vectors.append(torch.tensor([0.01], device="cuda"))
    out = [torch.empty(m, d, device="cuda", dtype=getattr(torch, kernel.out))] if kernel.out else []
    if kernel.quantize:
        out += [torch.empty(m, d, device="cuda", dtype=torch.int8), torch.empty(m, device="cuda")]
    function(x, *vectors, *out)


def run_attention(name: str, kernel: CudaAttention, target: CudaTarget) -> None:
    function = build.load(build.compile_library(attention.source(ATTENTION, target), target))[name]
    batch, length, dtype = 2, 70, getattr(torch, kernel.dtype)
    shapes = [(kernel.heads, kernel.head_dim), (kernel.kv_heads, kernel.head_dim), (kernel.kv_heads, kernel.value_dim)]
    if kernel.layout == "heads":
        parts = [torch.randn(batch, h, length, d, device="cuda").to(dtype) for h, d in shapes]
    else:
        parts = [torch.randn(batch, length, h * d, device="cuda").to(dtype) for h, d in shapes]
    tensors = [torch.cat(parts, -1)] if kernel.layout == "merged" else parts
    if kernel.mask:
        shape = [n if own else 1 for own, n in zip(kernel.mask_axes, (batch, kernel.heads, length))]
        mask = torch.randn(*shape, length, device="cuda")
        tensors.append(mask > -1 if kernel.mask == "bool" else mask)
    width = kernel.heads * kernel.value_dim
    function(*tensors, torch.empty(batch, length, width, device="cuda", dtype=getattr(torch, kernel.out)))


def run_quantized_attention(name: str, kernel: CudaQuantizedAttention, target: CudaTarget) -> None:
    library = build.compile_library(quantized_attention.source(QUANTIZED_ATTENTION, target), target)
    shapes = [(kernel.heads, kernel.head_dim), (kernel.kv_heads, kernel.head_dim), (kernel.kv_heads, kernel.value_dim)]
    q, k, v = (np.random.default_rng(0).standard_normal((2, h, 70, d)) for h, d in shapes)
    packed = [torch.from_numpy(np.ascontiguousarray(a)).cuda() for a in kernel.encode(q, k, v)]
    y = torch.empty(2, 70, kernel.heads * kernel.value_dim, device="cuda", dtype=getattr(torch, kernel.out))
    build.load(library)[name](*packed, y)


def run_cache(name: str, kernel: CudaCacheAttention, target: CudaTarget) -> None:
    module = build.load(build.compile_library(cache.source(CACHES, target), target))
    k, v = np.random.default_rng(0).standard_normal((2, 2, kernel.kv_heads, 256, kernel.head_dim))
    packed = [torch.from_numpy(np.ascontiguousarray(a)).cuda() for a in kernel.encode(k, v)]
    q = torch.randn(2, kernel.heads, kernel.head_dim, device="cuda", dtype=torch.float16)
    parts = torch.empty(kernel.splits, 2, kernel.heads, kernel.head_dim + 2, device="cuda")
    module[name](q, *packed, torch.tensor([70, 256], dtype=torch.int32, device="cuda"), parts)
    module[f"{name}_merge"](parts, torch.empty_like(q))


def main() -> None:
    part, parts = map(int, sys.argv[1].split("/")) if len(sys.argv) > 1 else (0, 1)
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    quantized = QUANTIZED_ATTENTION.items()
    work = [lambda c=c: run_linear(c, target) for c in CASES]
    work += [lambda n=n, k=k: run_rowwise(n, k, target) for n, k in row_kernels(target).items()]
    work += [lambda n=n, k=k: run_attention(n, k, target) for n, k in ATTENTION.items()]
    work += [lambda n=n, k=k: run_quantized_attention(n, k, target) for n, k in quantized]
    work += [lambda n=n, k=k: run_cache(n, k, target) for n, k in CACHES.items()]
    mine = work[part::parts]
    for run in mine:
        run()
    torch.cuda.synchronize()
    print(len(mine), "of", len(work), "groups of kernels done")


if __name__ == "__main__":
    main()
