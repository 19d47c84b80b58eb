"""A compiled program on a CUDA device: the numbers of ``model.onnx``, torch tensors in and out, streams, CUDA graphs.

Programs are those ``prepare.py --programs`` left in the cache, or are compiled here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import qcompile
from qcompile import ort
from qcompile.codegen.kernels.cuda import build
from qcompile.errors import InputError

from .models import RECIPES, float_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def program(recipe: str, folder: Path) -> qcompile.CompiledModel:
    prepared = build.cache_directory() / "programs" / recipe
    if prepared.exists():
        return qcompile.load(prepared)
    ir.save(float_model(), folder / "m.onnx")
    return qcompile.compile(folder / "m.onnx", target="cuda", recipe=recipe, output=folder / "out", progress=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_program(recipe: str, tmp_path: Path) -> None:
    compiled = program(recipe, tmp_path)
    session = ort.session(compiled.onnx_path)
    for rows in (1, 5, 17, 200):
        x = torch.randn(rows, 48, device="cuda")
        want = ort.run(session, {"x": x.cpu().numpy()})["y"]
        y = compiled(x)
        assert y.is_cuda and np.linalg.norm(y.cpu().numpy() - want) <= 2e-3 * np.linalg.norm(want)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(compiled(x), y)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):  # results that are still held took memory a captured call may not ask for
        compiled(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compiled(x)
    x.normal_()
    graph.replay()
    assert torch.equal(captured, compiled(x))
    with pytest.raises(InputError, match="float16"):
        compiled(x.half())
