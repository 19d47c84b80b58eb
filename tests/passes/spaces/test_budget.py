"""The analysis of a large model reads no weight and stays within its budget of time and memory."""

import resource
import time

import llama_graph
import pytest

from qcompile.passes.spaces import analyse


def test_four_layers_of_a_7b_decoder():
    reads = llama_graph.Reads()
    model = llama_graph.llama_graph(4, 4096, 11008, 32, 32, 32000, reads)
    start = time.thread_time()
    spaces = analyse(model)
    assert time.thread_time() - start < 5
    assert reads.names == []
    assert spaces[0].group == "R+.O(4096)"


@pytest.mark.slow
def test_all_layers_of_a_7b_decoder():
    reads = llama_graph.Reads()
    model = llama_graph.llama_graph(32, 4096, 11008, 32, 32, 32000, reads)
    start = time.thread_time()
    analyse(model)
    assert time.thread_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20
    assert reads.names == []
