"""The analysis of a large model reads no weight and stays within its budget of time and memory."""

import os
import subprocess
import sys
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


CODE = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import llama_graph
from qcompile.passes.spaces import analyse
reads = llama_graph.Reads()
model = llama_graph.llama_graph(32, 4096, 11008, 32, 32, 32000, reads)
start = time.thread_time()
analyse(model)
seconds = time.thread_time() - start
# Not ru_maxrss: a child inherits that of the process that started it.
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(seconds, peak, reads.names == [])
"""


@pytest.mark.slow
def test_all_layers_of_a_7b_decoder():
    # A process of its own: the peak of memory is that of a whole process.
    command = [sys.executable, "-c", CODE, os.path.dirname(llama_graph.__file__)]
    seconds, peak, untouched = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(seconds) < 20
    assert int(peak) < 1 << 20
    assert untouched == "True"
