"""A compiled program on a CUDA device: the numbers of ``model.onnx``, torch tensors in and out, streams, CUDA graphs.

Programs are those ``prepare.py --programs`` left in the cache, or are compiled here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qcompile
from qcompile import ort
from qcompile.codegen.kernels.cuda import build
from qcompile.errors import InputError

from .models import RECIPES, TOLERANCE, compile_program, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def program(name: str, folder: Path) -> qcompile.CompiledModel:
    prepared = build.cache_directory() / "programs" / name
    return qcompile.load(prepared) if prepared.exists() else compile_program(name, folder, output=folder / "out")


@pytest.mark.parametrize("name", RECIPES)
def test_program(name: str, tmp_path: Path) -> None:
    compiled = program(name, tmp_path)
    session = ort.session(compiled.onnx_path)
    for rows in (1, 5, 17, 200):
        given = inputs(name, rows, rows)
        (want,) = ort.run(session, given).values()
        x = torch.from_numpy(given["x"]).cuda()
        y = compiled(x)
        assert y.is_cuda and np.linalg.norm(y.cpu().numpy() - want) <= TOLERANCE.get(name, 2e-3) * np.linalg.norm(want)
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
