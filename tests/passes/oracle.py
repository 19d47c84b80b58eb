"""Numerical oracle of an operator's symmetries, and the same number from the analysis.

For y = f(x_1, x_2, ...; c) with constants c, count the infinitesimal symmetries

    D_x f [A_i x_i] + D_c f [dc] = B f          A_i, B in gl, dc any change of the constants

as the dimension of the null space over sampled x, by SVD. Each A_i acts on the last axis of its input and B on that of
the output, the same for all leading indices. Only what moves a space (the A_i and B) is counted; numbers (constants with one
element) and the constants in ``fixed`` stay as they are. ``blocks`` restricts the A_i to block diagonal matrices, as the groups of the analysis are.

The analysis sees the same operator between linear layers, so that every symmetry it allows is one of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.passes.execute import run
from qcompile.passes.spaces import Spaces, analyse

STEP = 1e-6


def parse(body: str, inputs: dict[str, tuple[int, ...]], constants: dict[str, np.ndarray], output: tuple[int, ...]):
    """An ``ir.Model`` of a body such as ``y = Relu(x)``; constants become initializers."""
    kinds = [("float", s, n) for n, s in inputs.items()]
    kinds += [("float" if a.dtype.kind == "f" else "int64", a.shape, n) for n, a in constants.items()]
    heads = ", ".join(f"{kind}[{','.join(map(str, shape))}] {name}" for kind, shape, name in kinds)
    text = (
        f'<ir_version: 10, opset_import: ["" : 23]> g ({heads}) => (float[{",".join(map(str, output))}] y) {{ {body} }}'
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, array in constants.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return ShapeInferencePass()(model).model


def between_linears(model: ir.Model, seed: int = 0) -> ir.Model:
    """The model with a matrix multiplied to every input and to the output."""
    rng = np.random.default_rng(seed)
    model = model.clone()
    graph = model.graph
    for k, value in enumerate(list(graph.inputs)):
        n = int(value.shape[-1])
        outer = ir.Value(name=f"outer_{k}", shape=value.shape, type=value.type)
        w = _matrix(graph, f"w_{k}", rng.standard_normal((n, n)))
        node = ir.node("MatMul", [outer, w], name=f"before_{k}")
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        node.outputs[0].name = f"in_{k}"
        graph.inputs[k] = outer
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        graph.insert_before(graph[0], [node])
    y = graph.outputs[0]
    v = _matrix(graph, "v", rng.standard_normal((int(y.shape[-1]),) * 2))
    node = ir.node("MatMul", [y, v], name="after")
    node.outputs[0].shape, node.outputs[0].type, node.outputs[0].name = y.shape, y.type, "result"
    graph.append(node)
    graph.outputs[0] = node.outputs[0]
    return model


def _matrix(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array.astype(np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.register_initializer(value)
    return value


def analysed(model: ir.Model) -> tuple[Spaces, int]:
    """The spaces between the linear layers and the dimension of their group (permutations and signs not counted)."""
    spaces = analyse(between_linears(model))
    solution = spaces.solution
    total = sum(solution.block(cell).dimension for cell in solution.cells)
    total += sum(len(f.classes) * f.logs.shape[1] for f in solution.families)
    return spaces, total


def numerical(model: ir.Model, seed: int = 0, blocks: Sequence[int] | None = None, fixed: Sequence[str] = ()) -> int:
    """Dimension of the symmetries of the operator itself."""
    import torch

    rng = np.random.default_rng(seed)
    inputs = {v.name: tuple(int(d) for d in v.shape) for v in model.graph.inputs}
    constants = {
        n: v.const_value.numpy().astype(np.float64)
        for n, v in model.graph.initializers.items()
        if v.const_value.numpy().dtype.kind == "f" and v.const_value.numpy().size > 1 and n not in fixed
    }
    block_of = {n: np.arange(s[-1]) * 0 for n, s in inputs.items()}
    if blocks is not None:
        block_of = {n: np.repeat(np.arange(len(blocks)), blocks) for n in inputs}

    def f(x: dict, c: dict) -> np.ndarray:
        feeds = {k: torch.from_numpy(v) for k, v in c.items()}
        return run(model, x, constants=feeds)["y"].numpy()

    def derivative(x, c, dx, dc):
        def at(step):
            return f(
                {k: v + step * dx.get(k, 0) for k, v in x.items()}, {k: v + step * dc.get(k, 0) for k, v in c.items()}
            )

        up, down = at(STEP), at(-STEP)
        return ((up - down) / (2 * STEP)).reshape(-1)

    parts, kinds, count = [], [], 0
    while not parts or count < 3 * len(kinds) + 24:
        kinds = []
        x = {n: rng.standard_normal(shape) for n, shape in inputs.items()}
        y = f(x, constants)
        columns = []
        for name, shape in inputs.items():
            for i, j in np.ndindex(shape[-1], shape[-1]):
                if block_of[name][i] != block_of[name][j]:
                    continue
                dx = np.zeros(shape)
                dx[..., i] = x[name][..., j]
                columns.append(derivative(x, constants, {name: dx}, {}))
                kinds.append("space")
        for name, c in constants.items():
            for index in np.ndindex(c.shape):
                dc = np.zeros(c.shape)
                dc[index] = 1
                columns.append(derivative(x, constants, {}, {name: dc}))
                kinds.append("constant")
        for i, j in np.ndindex(y.shape[-1], y.shape[-1]):
            b = np.zeros(y.shape)
            b[..., i] = y[..., j]
            columns.append(-b.reshape(-1))
            kinds.append("space")
        parts.append(np.stack(columns, 1))
        count += y.size
    matrix = np.concatenate(parts)
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    null = vectors[:, values < 1e-10 * values[-1]].T
    moving = np.array([k == "space" for k in kinds])
    return int(np.linalg.matrix_rank(null[:, moving], tol=1e-5)) if len(null) else 0


def permutation_symmetries(model: ir.Model, sources: Sequence[Sequence[int]], seed: int = 0) -> list[bool]:
    """For each permutation of the channels of all inputs: is the output permuted in some way, for all x?"""
    rng = np.random.default_rng(seed)
    results = []
    for source in sources:
        x = {v.name: rng.standard_normal([int(d) for d in v.shape]) for v in model.graph.inputs}
        before = run(model, x)["y"].numpy()
        after = run(model, {k: v[..., list(source)] for k, v in x.items()})["y"].numpy()
        before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
        results.append(all(any(np.allclose(a, b) for b in before.T) for a in after.T))
    return results
