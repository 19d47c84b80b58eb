"""Row kernels on a CUDA device against numpy: values to rounding, codes wherever the quotient is no tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import build, rowwise
from qcompile.targets.cuda import TARGETS, for_capability

from . import cases
from .cases import CLUSTERS, ROWWISE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}

ROUNDED = 0.25 / 127
"""How far rounding between the products of a rotation moves an element, times the largest of the row, at most; its standard deviation
is 0.01 steps of eight bits for normal rows, and most where all elements of the result are large."""


def rows(kernel: rowwise.CudaRowwise, m: int) -> torch.Tensor:
    """Rows of all sizes: zeros, sums that leave the range of float16, outliers, and what only other types hold."""
    x = torch.randn(m, kernel.width * (2 if kernel.gated else 1), device="cuda")
    if kernel.transform and m > 4:
        x[1] = 60000 * torch.sign(x[1] + 1.5)
        x[2, ::1000] *= 1000
        if kernel.dtype != "float16" and not (kernel.gated or kernel.activation):
            x[3] *= 1e15
            x[4] *= 1e-18
    x[m // 2] = 0
    return x.to(getattr(torch, kernel.dtype))


def matrix(size: int, seed: int) -> torch.Tensor:
    """Invertible, columns of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return (orthogonal * (3 * torch.rand(size, generator=generator) + 0.5)).cuda()


@pytest.mark.parametrize("name", [*ROWWISE, *CLUSTERS])
def test_matches_numpy(name: str) -> None:
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    kernels = cases.rowwise(target)
    if name not in kernels:
        pytest.skip("the chip has no clusters")
    kernel = kernels[name]
    function = build.load(build.compile_library(rowwise.source(kernels, target), target))[name]
    torch.manual_seed(len(name))
    for m in (1, 2, 7, 33, 100, 301 if kernel.width > 4096 else 1300):  # more than blocks that fit at once
        x = rows(kernel, m)
        count = kernel.gamma + kernel.beta + kernel.factor
        vectors = [torch.rand(kernel.width, device="cuda") + 0.5 for _ in range(count)]
        operands = list(vectors)
        if kernel.mixed:
            vectors += [matrix(size, size) for size in kernel.kronecker]
            packed = kernel.mixed.pack(*(v.cpu().numpy() for v in vectors[-2:]))
            operands += [
                torch.from_numpy(a.view(np.int32)).cuda().view(getattr(torch, str(a.dtype))) for a in packed.values()
            ]
        if kernel.quantize == "tensor":
            vectors.append(torch.tensor([0.013], device="cuda"))
            operands.append(vectors[-1])
        out = []
        if kernel.out:
            out.append(torch.full((m, kernel.width), torch.nan, dtype=getattr(torch, kernel.out), device="cuda"))
        if kernel.quantize:
            out.append(torch.full((m, kernel.width), 99, dtype=torch.int8, device="cuda"))
            out.append(torch.full((m,), torch.nan, device="cuda"))
        function(x, *operands, *out)
        want = kernel.reference(x.float().cpu().numpy(), *(v.cpu().numpy() for v in vectors))
        got = [t.float().cpu().numpy() for t in out]
        if kernel.out:
            y = got.pop(0)
            off = np.abs(y - want["y"]).max(1)
            assert (off <= 2 * STEPS[kernel.out] * np.maximum(np.abs(want["y"]).max(1), 1e-3)).all()
        if kernel.quantize:
            codes, scale = got
            near, share, relative = np.full((m, 1), 2e-3), 2e-3, 1e-5
            if kernel.transform:
                relative = 3e-3 if kernel.mixed else 1e-3  # small factors: the largest of a row is a sum of few
                near, share = ROUNDED * np.abs(want["real"]).max(1, keepdims=True), 0.05
            assert np.allclose(scale, want["scale"], rtol=relative, atol=0)
            off = codes != want["codes"]
            tie = np.abs(want["real"] - np.floor(want["real"]) - 0.5)
            assert (tie < np.maximum(near, 2e-3))[off].all() and off.mean() < share, (m, off.mean(), tie[off].max())
            assert (np.abs(codes - want["codes"]) <= 1 + near).all()
