"""A compiled program on a CUDA device: the numbers of ``model.onnx``, torch tensors in and out, streams, CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import qcompile
from qcompile import ort
from qcompile.errors import InputError

from .test_program import float_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("recipe", ["w8a8-rtn", "w4a8-rtn", "w8a16"])
def test_program(recipe: str, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    ir.save(float_model(), model)
    compiled = qcompile.compile(model, target="cuda", recipe=recipe, output=tmp_path / "out", progress=False)
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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compiled(x)
    x.normal_()
    graph.replay()
    assert torch.equal(captured, compiled(x))
    with pytest.raises(InputError, match="float16"):
        compiled(x.half())
