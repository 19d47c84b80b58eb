"""Rotate the inputs of linear operators by Hadamard blocks, online.

    x W = (x H) (H^T W),   H = blockdiag(H_b, ..., H_b) orthonormal

The rotation spreads outlier channels over a block, which brings the largest entry of a token down to a few standard
deviations: per-token quantization loses less. It is exact wherever it is put, since the weight takes the inverse; the
price is b log b additions per block at run time, which kernels fuse into the quantizer.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024), the online part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompile.errors import FormatError
from qcompile.formats.hadamard import hadamard_matrix, largest_block
from qcompile.passes.domain import DOMAIN, add_functions
from qcompile.passes.graph import add_initializer
from qcompile.passes.sites import LinearSite


def rotate(model: ir.Model, sites: Iterable[LinearSite], block: int = 128) -> tuple[int, list[tuple[str, str]]]:
    """Insert ``qcompile::BlockRotate`` before ``sites`` of ``model`` and fold its inverse into their weights.

    Args:
        model: rewritten in place.
        sites: linear operators with float weights.
        block: largest order of the blocks; the order used divides the width.

    Returns:
        The number of rotated activations, and what was refused: (where, reason).
    """
    graph = model.graph
    rotated: dict[int, ir.Value] = {}
    folded: dict[tuple[str, int], ir.Value] = {}
    matrices: dict[int, ir.Value] = {}
    refused = []
    for site in sites:
        width = site.shape[0]
        order = block_order(width, block)
        if order < 4:
            refused.append((site.name, f"width {width} has no Hadamard block of order 4 or more"))
            continue
        matrix = hadamard_matrix(order)
        if order not in matrices:
            matrices[order] = add_initializer(graph, f"hadamard.{order}", matrix.astype(np.float32))
        if id(site.x) not in rotated:
            node = ir.node("BlockRotate", [site.x, matrices[order]], domain=DOMAIN, name=f"{site.x.name}.rotate")
            out = node.outputs[0]
            out.name, out.shape, out.type = f"{site.x.name}.rotated", site.x.shape, site.x.type
            producer = site.x.producer()
            if producer is not None:
                graph.insert_after(producer, [node])
            else:
                graph.insert_before(graph[0], [node])
            rotated[id(site.x)] = out
        key = (site.weight.name or "", order)
        if key not in folded:
            weight = site.matrix().astype(np.float64).reshape(-1, order, site.shape[1])
            inverse = np.einsum("ij,bin->bjn", matrix, weight).reshape(site.shape)
            folded[key] = add_initializer(graph, f"{site.weight.name}.rotated", inverse.astype(np.float32), like=site.weight)
        site.node.replace_input_with(0, rotated[id(site.x)])
        site.node.replace_input_with(1, folded[key])
    add_functions(model)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    return len(rotated), refused


def block_order(width: int, most: int) -> int:
    """Order of the blocks for a row of ``width``: ``most`` if it divides the width and has a matrix, else a power of two."""
    if width % most == 0:
        try:
            hadamard_matrix(most)
            return most
        except FormatError:
            pass
    return largest_block(width, most)
