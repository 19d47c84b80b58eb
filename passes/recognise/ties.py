"""Weights that a file holds twice become one: an embedding table saved again as the output matrix is a tie."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.recognise.linear import is_weight
from qcompile.passes.recognise.result import Found, Recognised

_SAMPLE = 64


def merge_equal_weights(graph: ir.Graph, report: Recognised) -> None:
    """Replace matrices (rank 2 and more) by an earlier initializer of the same type, shape and values.

    Few elements are compared first, so that of memory-mapped weights only candidates are read whole. Vectors stay apart:
    equal gains and biases are a coincidence, and sharing them would tie layers that are not tied.
    """
    groups: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.LazyTensor) or len(tensor.shape) < 2 or tensor.size <= _SAMPLE:
            continue
        if not is_weight(value, len(tensor.shape)) or value.is_graph_output():
            continue
        flat = tensor.numpy().reshape(-1)
        sample = (np.asarray(flat[:_SAMPLE]).tobytes(), np.asarray(flat[-_SAMPLE:]).tobytes())
        candidates = groups.setdefault((tensor.dtype, tuple(tensor.shape), *sample), [])
        for other in candidates:
            assert other.const_value is not None
            if np.array_equal(other.const_value.numpy(), tensor.numpy()):
                ir.convenience.replace_all_uses_with(value, other)
                del graph.initializers[value.name or ""]
                report.found.append(Found("merged weights", value.name or "", f"'{value.name}' is '{other.name}'"))
                break
        else:
            candidates.append(value)
