"""Control flow and sequences: If, Loop, Scan, the Sequence and Optional operators.

A branch whose condition is known is converted alone; otherwise both become branches of the program. Loops are unrolled, so their
number of iterations must be known (up to a limit) and no condition may end them early. A sequence is a list kept by the
conversion: its length must follow from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known, Scope
from qcompile.codegen.relax.dims import as_expr
from qcompile.codegen.relax.ops.shape import concat, slice_axis
from qcompile.codegen.relax.registry import converter

#: Loops of more iterations are refused instead of unrolled.
UNROLL_LIMIT = 256


def run_graph(ctx: Context, graph: ir.Graph, inputs: Sequence[Known]) -> list[Known]:
    """Converts a subgraph once with the given inputs; it sees the values of the graphs around it."""
    from qcompile.codegen.relax.convert import convert_nodes

    outer = ctx.scope
    ctx.scope = Scope(outer.opsets, parent=outer, values=dict(zip(graph.inputs, inputs)))
    try:
        convert_nodes(ctx, graph)
        return [ctx.known(v) for v in graph.outputs]
    finally:
        ctx.scope = outer


def tensor(ctx: Context, known: Known, node: ir.Node) -> relax.Expr:
    """The tensor expression of an entry."""
    if known.sequence is not None:
        raise ctx.unsupported(node, "a sequence where a tensor is needed")
    return ctx.tensor(known)


@converter("", "If")
def _if(ctx: Context, node: ir.Node, condition: relax.Expr) -> list[Any]:
    known = ctx.symbolic(node.inputs[0])
    branches = [attr(node, name) for name in ("then_branch", "else_branch")]
    if known is not None and isinstance(known.reshape(-1)[0], bool | int):
        return run_graph(ctx, branches[0 if known.reshape(-1)[0] else 1], [])
    made, types = [], []
    for branch in branches:
        with ctx.block() as finish:
            results = run_graph(ctx, branch, [])
            values = [tensor(ctx, r, node) for r in results]
            made.append(finish(relax.Tuple(values)))
        types.append([(ctx.storage(v), ctx.shape(v), r.dtype) for v, r in zip(values, results)])
    outputs = []
    for (dtype, a, onnx_type), (other, b, _) in zip(*types):
        if dtype != other or len(a) != len(b):
            raise ctx.unsupported(node, "the branches return tensors of different type or number of dimensions")
        same = all(ctx.dims.equal(p, q) for p, q in zip(a, b))
        outputs.append((dtype, a if same else None, len(a), onnx_type))
    choice = ctx.bb.emit(relax.If(ctx.reshape(condition, []), made[0], made[1]))
    results = []
    for i, (dtype, shape, rank, onnx_type) in enumerate(outputs):
        item = ctx.bb.emit(relax.TupleGetItem(choice, i))
        if shape is None:
            shape = [ctx.dims.run_time_var("branch") for _ in range(rank)]
        item = ctx.bb.match_cast(item, relax.TensorType([as_expr(d) for d in shape], dtype))
        results.append(Known(onnx_type, expr=item))
    return results


@converter("", "Loop")
def _loop(ctx: Context, node: ir.Node, *args: Any) -> list[Any]:
    body = attr(node, "body")
    carried = len(node.inputs) - 2
    limit = None if node.inputs[0] is None else ctx.symbolic(node.inputs[0])
    start = None if node.inputs[1] is None else ctx.symbolic(node.inputs[1])
    if node.inputs[0] is not None and (limit is None or not isinstance(limit.reshape(-1)[0], int)):
        raise ctx.unsupported(node, "the number of iterations is known at run time only")
    if node.inputs[1] is not None and (start is None or not isinstance(start.reshape(-1)[0], int)):
        raise ctx.unsupported(node, "whether the loop runs is known at run time only")
    count = int(limit.reshape(-1)[0]) if limit is not None else UNROLL_LIMIT + 1
    going = start is None or bool(start.reshape(-1)[0])
    state = [ctx.known(v) if v is not None else Known(ir.DataType.FLOAT, sequence=[]) for v in node.inputs[2:]]
    scans: list[list[relax.Expr]] = [[] for _ in range(len(body.outputs) - 1 - carried)]
    types: list[ir.DataType] = []
    i = 0
    while going and i < count:
        if i >= UNROLL_LIMIT:
            raise ctx.unsupported(node, f"more than {UNROLL_LIMIT} iterations (or a number known at run time only)")
        number = Known(ir.DataType.INT64, constant=np.array(i, np.int64))
        proceed = Known(ir.DataType.BOOL, constant=np.array(True))
        results = run_graph(ctx, body, [number, proceed, *state])
        condition = _constant_bool(ctx, results[0])
        if condition is None:
            raise ctx.unsupported(node, "the loop's condition is known at run time only")
        going = condition
        state = results[1 : 1 + carried]
        for scan, item in zip(scans, results[1 + carried :]):
            expr = tensor(ctx, item, node)
            scan.append(ctx.reshape(expr, [1, *ctx.shape(expr)]))
        types = [item.dtype for item in results[1 + carried :]]
        i += 1
    stacked = []
    for scan, output, dtype in zip(
        scans, body.outputs[1 + carried :], types or [v.dtype for v in body.outputs[1 + carried :]]
    ):
        if not scan:
            raise ctx.unsupported(node, f"no iteration: the shape of scan output {output.name!r} is not known")
        stacked.append(Known(dtype, expr=concat(ctx, scan, 0)))
    return [*state, *stacked]


def _constant_bool(ctx: Context, known: Known) -> bool | None:
    if known.constant is not None or known.tensor is not None:
        array = known.constant if known.constant is not None else known.tensor.numpy()
        return bool(array.reshape(-1)[0])
    if known.symbolic is not None and isinstance(known.symbolic.reshape(-1)[0], bool | int):
        return bool(known.symbolic.reshape(-1)[0])
    return None


@converter("", "Scan")
def _scan(ctx: Context, node: ir.Node, *args: Any) -> list[Any]:
    body = attr(node, "body")
    count_in = attr(node, "num_scan_inputs")
    if ctx.version(node) < 9:
        return _batched_scan(ctx, node, body, count_in, list(args))
    values = [ctx.known(v) for v in node.inputs]
    states, inputs = values[: len(values) - count_in], values[len(values) - count_in :]
    count_out = len(body.outputs) - len(states)
    axes = attr(node, "scan_input_axes", None) or [0] * count_in
    out_axes = attr(node, "scan_output_axes", None) or [0] * count_out
    backward = attr(node, "scan_input_directions", None) or [0] * count_in
    out_backward = attr(node, "scan_output_directions", None) or [0] * count_out
    exprs = [tensor(ctx, v, node) for v in inputs]
    final, scans = _unroll_scan(ctx, node, body, states, list(zip(exprs, inputs, axes, backward)), count_out)
    results: list[Known] = list(final)
    for (items, dtype), axis, reverse in zip(scans, out_axes, out_backward):
        rank = ctx.rank(items[0]) + 1
        axis %= rank
        parts = [ctx.reshape(e, [*ctx.shape(e)[:axis], 1, *ctx.shape(e)[axis:]]) for e in items]
        results.append(Known(dtype, expr=concat(ctx, parts[::-1] if reverse else parts, axis)))
    return results


def _unroll_scan(
    ctx: Context,
    node: ir.Node,
    body: ir.Graph,
    states: Sequence[Known],
    inputs: Sequence[tuple[relax.Expr, Known, int, int]],
    count_out: int,
) -> tuple[list[Known], list[tuple[list[relax.Expr], ir.DataType]]]:
    lengths = [ctx.shape(e)[axis % ctx.rank(e)] for e, _, axis, _ in inputs]
    steps = next((n for n in lengths if isinstance(n, int)), lengths[0])
    if not isinstance(steps, int):
        raise ctx.unsupported(node, "the length of the scanned axis is known at run time only")
    if steps > UNROLL_LIMIT or steps == 0:
        raise ctx.unsupported(node, f"{steps} iterations; between 1 and {UNROLL_LIMIT} can be unrolled")
    for n in lengths:
        ctx.require_equal(n, steps)
    state = list(states)
    scans: list[tuple[list[relax.Expr], ir.DataType]] = []
    for i in range(steps):
        items = []
        for expr, known, axis, reverse in inputs:
            axis %= ctx.rank(expr)
            item = slice_axis(ctx, expr, axis, steps - 1 - i if reverse else i, 1)
            shape = ctx.shape(item)
            items.append(Known(known.dtype, expr=ctx.reshape(item, [*shape[:axis], *shape[axis + 1 :]])))
        results = run_graph(ctx, body, [*state, *items])
        state = results[: len(states)]
        outs = results[len(states) :]
        if not scans:
            scans = [([], r.dtype) for r in outs]
        for (made, _), r in zip(scans, outs):
            made.append(tensor(ctx, r, node))
    return state, scans


def _batched_scan(ctx: Context, node: ir.Node, body: ir.Graph, count_in: int, args: list[Any]) -> list[Any]:
    """Opset 8: every tensor has a leading batch dimension, each sample is scanned by itself along axis 1."""
    if args[0] is not None:
        raise ctx.unsupported(node, "sequence lengths per sample")
    values = [ctx.known(v) for v in node.inputs[1:]]
    batch = ctx.shape(tensor(ctx, values[0], node))[0]
    if not isinstance(batch, int):
        raise ctx.unsupported(node, "the batch size must be known")
    backward = attr(node, "directions", None) or [0] * count_in
    split = len(values) - count_in
    columns: list[list[relax.Expr]] = []
    kinds: list[ir.DataType] = []
    for n in range(batch):
        sample = []
        for v in values:
            part = slice_axis(ctx, tensor(ctx, v, node), 0, n, 1)
            sample.append(Known(v.dtype, expr=ctx.reshape(part, ctx.shape(part)[1:])))
        inputs = [(v.expr, v, 0, b) for v, b in zip(sample[split:], backward)]
        final, scans = _unroll_scan(ctx, node, body, sample[:split], inputs, len(body.outputs) - split)
        made = [tensor(ctx, s, node) for s in final]
        for items, _ in scans:
            made.append(concat(ctx, [ctx.reshape(e, [1, *ctx.shape(e)]) for e in items], 0))
        kinds = [s.dtype for s in final] + [dtype for _, dtype in scans]
        columns = columns or [[] for _ in made]
        for column, e in zip(columns, made):
            column.append(ctx.reshape(e, [1, *ctx.shape(e)]))
    return [Known(kind, expr=concat(ctx, column, 0)) for kind, column in zip(kinds, columns)]


# -- sequences ------------------------------------------------------------------------------------------------------


def _items(ctx: Context, node: ir.Node, position: int = 0) -> list[Known]:
    known = ctx.known(node.inputs[position])
    if known.sequence is None:
        raise ctx.unsupported(node, "the sequence's length does not follow from the graph")
    return known.sequence


def _position(ctx: Context, node: ir.Node, index: int, length: int, default: int) -> int:
    if len(node.inputs) <= index or node.inputs[index] is None:
        return default
    constant = ctx.constant(node.inputs[index])
    if constant is None:
        raise ctx.unsupported(node, "the position in the sequence must be constant")
    position = int(constant.reshape(-1)[0])
    return position + length if position < 0 else position


@converter("", "SequenceEmpty")
def _sequence_empty(ctx: Context, node: ir.Node) -> Known:
    return Known(ir.DataType(attr(node, "dtype", 1)), sequence=[])


@converter("", "SequenceConstruct")
def _sequence_construct(ctx: Context, node: ir.Node, *args: Any) -> Known:
    items = [ctx.known(v) for v in node.inputs]
    return Known(items[0].dtype, sequence=items)


@converter("", "SequenceInsert")
def _sequence_insert(ctx: Context, node: ir.Node, *args: Any) -> Known:
    items = list(_items(ctx, node))
    items.insert(_position(ctx, node, 2, len(items), len(items)), ctx.known(node.inputs[1]))
    return Known(ctx.known(node.inputs[1]).dtype, sequence=items)


@converter("", "SequenceErase")
def _sequence_erase(ctx: Context, node: ir.Node, *args: Any) -> Known:
    items = list(_items(ctx, node))
    del items[_position(ctx, node, 1, len(items), len(items) - 1)]
    return Known(ctx.known(node.inputs[0]).dtype, sequence=items)


@converter("", "SequenceAt")
def _sequence_at(ctx: Context, node: ir.Node, *args: Any) -> Known:
    items = _items(ctx, node)
    return items[_position(ctx, node, 1, len(items), 0)]


@converter("", "SequenceLength")
def _sequence_length(ctx: Context, node: ir.Node, *args: Any) -> Known:
    return Known(ir.DataType.INT64, constant=np.array(len(_items(ctx, node)), np.int64))


@converter("", "ConcatFromSequence")
def _concat_from_sequence(ctx: Context, node: ir.Node, *args: Any) -> Known:
    items = _items(ctx, node)
    if not items:
        raise ctx.unsupported(node, "an empty sequence has no result type")
    exprs = [tensor(ctx, item, node) for item in items]
    axis = attr(node, "axis")
    if attr(node, "new_axis", 0):
        axis %= ctx.rank(exprs[0]) + 1
        exprs = [ctx.reshape(e, [*ctx.shape(e)[:axis], 1, *ctx.shape(e)[axis:]]) for e in exprs]
    return Known(items[0].dtype, expr=concat(ctx, exprs, axis))


@converter("", "SplitToSequence")
def _split_to_sequence(ctx: Context, node: ir.Node, x: relax.Expr, split: Any = None) -> Known:
    axis = attr(node, "axis", 0) % ctx.rank(x)
    size = ctx.shape(x)[axis]
    dtype = ctx.dtype(node.inputs[0])
    keep = True
    if split is None:
        if not isinstance(size, int):
            raise ctx.unsupported(node, "the length of the split axis must be known")
        sizes = [1] * size
        keep = bool(attr(node, "keepdims", 1))
    else:
        constant = ctx.constant(node.inputs[1])
        if constant is None:
            raise ctx.unsupported(node, "the sizes of the parts must be constant")
        if constant.ndim == 0:
            if not isinstance(size, int):
                raise ctx.unsupported(node, "the length of the split axis must be known")
            chunk = int(constant)
            sizes = [min(chunk, size - i) for i in range(0, size, chunk)]
        else:
            sizes = [int(s) for s in constant]
    start, items = 0, []
    for part in sizes:
        piece = slice_axis(ctx, x, axis, start, part)
        if not keep:
            shape = ctx.shape(piece)
            piece = ctx.reshape(piece, [*shape[:axis], *shape[axis + 1 :]])
        items.append(Known(dtype, expr=piece))
        start += part
    return Known(dtype, sequence=items)


@converter("", "SequenceMap")
def _sequence_map(ctx: Context, node: ir.Node, *args: Any) -> list[Known]:
    body = attr(node, "body")
    items = _items(ctx, node)
    rest = [ctx.known(v) for v in node.inputs[1:]]
    columns: list[list[Known]] = [[] for _ in body.outputs]
    for i, item in enumerate(items):
        others = [r.sequence[i] if r.sequence is not None else r for r in rest]
        for column, result in zip(columns, run_graph(ctx, body, [item, *others])):
            column.append(result)
    return [Known(column[0].dtype if column else ir.DataType.FLOAT, sequence=column) for column in columns]


@converter("", "Optional", "OptionalGetElement")
def _optional(ctx: Context, node: ir.Node, *args: Any) -> Known:
    if not node.inputs or node.inputs[0] is None:
        raise ctx.unsupported(node, "an empty optional")
    return ctx.known(node.inputs[0])


@converter("", "OptionalHasElement")
def _optional_has_element(ctx: Context, node: ir.Node, *args: Any) -> Known:
    return Known(ir.DataType.BOOL, constant=np.array(bool(node.inputs) and node.inputs[0] is not None))
