"""Row kernels on a CUDA device against numpy: values to rounding, codes wherever the quotient is no tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.codegen.kernels.cuda import build, rowwise
from qcompile.targets.cuda import TARGETS, for_capability

from .cases import ROWWISE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("name", list(ROWWISE))
def test_matches_numpy(name: str) -> None:
    kernel = ROWWISE[name]
    target = TARGETS[for_capability(*torch.cuda.get_device_capability()).cpu]
    function = build.load(build.compile_library(rowwise.source(ROWWISE, target), target))[name]
    torch.manual_seed(len(name))
    for m in (1, 2, 33, 301 if kernel.width > 4096 else 1100):  # more than blocks that fit at once
        x = torch.randn(m, kernel.width * (2 if kernel.gated else 1), dtype=getattr(torch, kernel.dtype), device="cuda")
        x[m // 2] = 0
        vectors = [torch.rand(kernel.width, device="cuda") + 0.5 for _ in range(kernel.gamma + kernel.beta)]
        if kernel.quantize == "tensor":
            vectors.append(torch.tensor([0.013], device="cuda"))
        out = []
        if kernel.out:
            out.append(torch.full((m, kernel.width), torch.nan, dtype=getattr(torch, kernel.out), device="cuda"))
        if kernel.quantize:
            out.append(torch.full((m, kernel.width), 99, dtype=torch.int8, device="cuda"))
            out.append(torch.full((m,), torch.nan, device="cuda"))
        function(x, *vectors, *out)
        want = kernel.reference(x.float().cpu().numpy(), *(v.cpu().numpy() for v in vectors))
        got = [t.float().cpu().numpy() for t in out]
        if kernel.out:
            y = got.pop(0)
            assert np.abs(y - want["y"]).max() <= 2 * STEPS[kernel.out] * np.abs(want["y"]).max()
        if kernel.quantize:
            codes, scale = got
            assert np.allclose(scale, want["scale"], rtol=1e-5, atol=0)
            off = codes != want["codes"]
            tie = np.abs(want["real"] - np.floor(want["real"]) - 0.5)
            assert (tie[off] < 2e-3).all() and off.mean() < 2e-3, (off.mean(), tie[off].max())
