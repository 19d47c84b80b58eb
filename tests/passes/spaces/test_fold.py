"""Folding is lazy: a weight is read and transformed when somebody asks for it, and not all are kept."""

import llama_graph
import numpy as np
import onnx_ir as ir

from qcompile.passes.asks import Centre, Rotate, RotateOnline, apply_asks
from qcompile.passes.spaces import analyse, fold
from qcompile.passes.spaces import lazy as lazy_module
from qcompile.passes.spaces.element import Element
from qcompile.passes.spaces.lazy import computed


def test_folding_reads_nothing_and_then_one_tensor_at_a_time():
    reads = llama_graph.Reads()
    model = llama_graph.llama_graph(2, 64, 96, 4, 2, 50, reads)
    spaces = analyse(model)
    folded = fold(spaces, Element.random(spaces.solution, np.random.default_rng(0)))
    # The gammas are peeled into the readers.
    assert all(name.endswith(("n1", "n2", "norm")) for name in reads.names)
    reads.names.clear()
    folded.graph.initializers["1.down"].const_value.numpy()
    assert reads.names == ["1.down"]


def test_asks_read_nothing_either():
    reads = llama_graph.Reads()
    model = llama_graph.llama_graph(2, 64, 96, 4, 2, 50, reads)
    rotated, report = apply_asks(None, analyse(model), [Centre(), Rotate(), RotateOnline()])
    assert len(report.applied) > 2 and all(name.endswith(("n1", "n2", "norm")) for name in reads.names)
    reads.names.clear()
    rotated.graph.initializers["0.up"].const_value.numpy()
    assert set(reads.names) == {"0.up"}


def test_no_more_is_kept_than_fits(monkeypatch):
    kept = lazy_module._Kept()
    monkeypatch.setattr(lazy_module, "_kept", kept)
    monkeypatch.setattr(lazy_module, "BUDGET", 10_000)
    calls = []

    def tensor(i, size):
        like = ir.tensor(np.zeros(size, np.float32), name=str(i))
        return computed(lambda: calls.append(i) or np.full(size, float(i)), like)

    tensors = [tensor(i, 1000) for i in range(5)]
    for i, t in enumerate(tensors):
        assert t.numpy().dtype == np.float32 and t.numpy()[0] == i
    assert calls == [0, 1, 2, 3, 4], "the second reading is answered from what is kept"
    assert kept.size == 8000 and len(kept.tensors) == 2
    tensors[0].numpy()
    assert calls[-1] == 0
    large = tensor(9, 5000)
    large.numpy(), large.numpy()
    assert calls[-2:] == [9, 9] and kept.size == 8000
    tensors.clear()
    del large, t
    assert kept.size == 0
