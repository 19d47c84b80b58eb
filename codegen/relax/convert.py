"""From an ONNX model to a Relax program: walks the graph, keeps what is known, calls the converters.

For every node, in this order: fold it if its inputs are constants; evaluate it if it is shape arithmetic; ask the
registered converters; expand the function of that name in the model; expand the operator by the function body the ONNX
specification gives for it. What is left is unsupported, and the error says which node of which module it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from qcompile.codegen.relax import dtypes, ops  # noqa: F401  (ops registers the converters)
from qcompile.codegen.relax.attributes import attr
from qcompile.codegen.relax.context import Context, Known, Scope, describe
from qcompile.codegen.relax.dims import as_expr, dim_text
from qcompile.codegen.relax.fold import fold
from qcompile.codegen.relax.program import RelaxProgram, Step, TensorSpec
from qcompile.codegen.relax.registry import converters
from qcompile.codegen.relax.shape_values import evaluate
from qcompile.codegen.relax.specification import default_attributes, output_dtypes, specified_function
from qcompile.errors import ModelError, QcompileError, UnsupportedOperatorError
from qcompile.targets.target import Target


def to_relax(
    model: ir.Model, *, target: Target | None = None, params_threshold: int = 1024, step: ir.Model | None = None
) -> RelaxProgram:
    """Converts a model.

    Args:
        model: any ONNX model; named dimensions stay symbolic. It is not modified.
        target: what will be compiled for; converters registered for its kind take part.
        params_threshold: initializers with at least this many elements become parameters of ``main``, smaller ones are
            embedded as constants.
        step: another form of the model with the same weights, which becomes the function ``step``.

    Raises:
        UnsupportedOperatorError: an operator, or an attribute or type it is used with, has no conversion.
        ModelError: the model is not valid (a shape error, a value without producer).
    """
    ctx = Context(target, params_threshold, dict(model.functions))
    main = _function(ctx, model.graph, "main")
    if step is not None:
        beside = ctx.beside(dict(step.functions))
        second = _function(beside, step.graph, "step")
    mod = relax.transform.ConvertToDataflow(min_size=1)(ctx.bb.finalize())
    mod = relax.transform.DeadCodeElimination(["main"] if step is None else ["main", "step"])(mod)
    mod, params = _finished(mod, ctx, main)
    program = RelaxProgram(mod, params, main.inputs, main.outputs, ctx.state)
    if step is not None:
        program.mod, own = _finished(mod, beside, second)
        names = _shared(params, own)
        extra = [name for name in names if name.startswith("step.")]
        written = [v.name for v in step.graph.inputs if any(node.op_type == "Append" for node, i in v.uses() if i == 0)]
        program.step = Step(second.inputs, second.outputs, names, extra, written)
    return program


@dataclass
class _Converted:
    """A function of the module under construction."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


def _function(ctx: Context, graph: ir.Graph, name: str) -> _Converted:
    """Converts a graph to a function of ``ctx.bb``."""
    ctx.scope = Scope(dict(graph.opset_imports))
    inputs = [v for v in graph.inputs if v.const_value is None]
    variables = [_input(ctx, v) for v in inputs]
    try:
        with ctx.bb.function(name):
            convert_nodes(ctx, graph)
            results = [_output(ctx, v) for v in graph.outputs]
            outputs = [
                _spec(v.name or f"output_{i}", ctx.dtype(v), ctx.shape(r))
                for i, (v, r) in enumerate(zip(graph.outputs, results))
            ]
            output = results[0] if len(results) == 1 else ctx.bb.emit(relax.Tuple(results))
            ctx.bb.emit_func_output(output, params=[*variables, *ctx.param_vars])
    except BaseException:
        ctx.bb._end_block()  # an abandoned block would be reported as a mistake of ours
        raise
    specs = [
        _spec(v.name or f"input_{i}", ctx.dtype(v), ctx.shape(x)) for i, (v, x) in enumerate(zip(inputs, variables))
    ]
    return _Converted(name, specs, outputs)


def _finished(mod: Any, ctx: Context, made: _Converted) -> tuple[Any, dict[str, np.ndarray]]:
    """The module with one function's parameters reduced to those it reads; returns these too."""
    count, name = len(made.inputs), made.name
    mod.update_func(mod.get_global_var(name), mod[name].with_attr("num_input", count))
    return _drop_unused_params(mod, ctx, name, count)


def _shared(params: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> list[str]:
    """Names in ``params`` of another function's parameters; those that are not there are added."""
    names = []
    for name, array in own.items():
        known = params.get(name)
        same = known is array or (known is not None and known.dtype == array.dtype and np.array_equal(known, array))
        names.append(name if same else f"step.{name}")
        params[names[-1]] = array if known is None or not same else known
    return names


def _input(ctx: Context, value: ir.Value) -> relax.Var:
    """The function parameter of a graph input."""
    if value.dtype not in dtypes.STORAGE or not isinstance(value.type, ir.TensorType):
        raise UnsupportedOperatorError(
            f"input {value.name!r} has type {value.type}: only tensors of numbers can be passed to a compiled program"
        )
    if value.shape is None:
        raise UnsupportedOperatorError(f"input {value.name!r} has no shape: its number of dimensions must be known")
    shape = []
    for i, d in enumerate(value.shape):
        if isinstance(d, int):
            shape.append(as_expr(d))
        elif d.value is None:
            shape.append(ctx.dims.var(f"{value.name}_{i}", unique=True))
        else:
            shape.append(as_expr(ctx.dims.parse(str(d.value))))
    variable = relax.Var(_identifier(value.name or "input"), relax.TensorType(shape, dtypes.STORAGE[value.dtype]))
    ctx.scope.values[value] = Known(value.dtype, expr=variable)
    return variable


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def _output(ctx: Context, value: ir.Value) -> relax.Expr:
    expr = ctx.expr(value)
    if not isinstance(expr, relax.Expr):
        raise UnsupportedOperatorError(f"output {value.name!r} is a sequence: only tensors can be returned")
    return expr


def _spec(name: str, dtype: ir.DataType, shape: Sequence[Any]) -> TensorSpec:
    return TensorSpec(name, dtypes.STORAGE[dtype], tuple(dim_text(d) for d in shape), dtype.name)


def _drop_unused_params(mod: Any, ctx: Context, name: str, num_inputs: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Parameters that nothing reads any more are not part of the function."""
    function = mod[name]
    used = set(relax.analysis.free_vars(function.body))
    keep = [i for i, v in enumerate(ctx.param_vars) if v in used]
    if len(keep) != len(ctx.param_vars):
        params = [*function.params[:num_inputs], *(function.params[num_inputs + i] for i in keep)]
        function = relax.Function(
            params, function.body, function.ret_ty, function.is_pure, function.attrs, function.span
        )
        mod.update_func(mod.get_global_var(name), function)
    names = list(ctx.params)
    return mod, {names[i]: ctx.params[names[i]] for i in keep}


def convert_nodes(ctx: Context, graph: ir.Graph | ir.Function) -> None:
    """Converts the nodes of a graph or function body in order, into the current scope."""
    for node in graph:
        convert_node(ctx, node)


def convert_node(ctx: Context, node: ir.Node) -> None:
    """Converts one node; its outputs are then known to the current scope."""
    try:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            ctx.scope.values[node.outputs[0]] = _constant(ctx, node)
            return
        folded = fold(ctx, node)
        if folded is not None:
            types = output_dtypes(ctx, node)
            for output, array, dtype in zip(node.outputs, folded, types):
                ctx.scope.values[output] = Known(dtype or ir.DataType.from_numpy(array.dtype), constant=array)
            return
        symbolic = evaluate(ctx, node)
        if symbolic is not None:
            dtype = output_dtypes(ctx, node)[0] or ir.DataType.INT64
            ctx.scope.values[node.outputs[0]] = _symbolic(symbolic, dtype)
            return
        if not _convert_registered(ctx, node) and not _expand(ctx, node):
            raise ctx.unsupported(node, "no conversion for this operator")
    except QcompileError:
        raise
    except Exception as error:
        raise ModelError(f"{describe(node)}: conversion failed: {type(error).__name__}: {error}") from error


def _symbolic(array: np.ndarray, dtype: ir.DataType) -> Known:
    flat = array.reshape(-1)
    if all(isinstance(e, int | bool) for e in flat):
        return Known(dtype, constant=np.array(flat.tolist(), dtype=dtype.numpy()).reshape(array.shape), symbolic=array)
    return Known(dtype, symbolic=array)


def _constant(ctx: Context, node: ir.Node) -> Known:
    """The value of a Constant node, in any of the attributes it may be given by."""
    for name, dtype in (
        ("value_int", "int64"),
        ("value_ints", "int64"),
        ("value_float", "float32"),
        ("value_floats", "float32"),
    ):
        if name in node.attributes:
            array = np.asarray(attr(node, name), dtype=dtype)
            return Known(ir.DataType.from_numpy(array.dtype), constant=array)
    if "value" not in node.attributes:
        raise ctx.unsupported(node, f"a constant given by {', '.join(node.attributes)} is not a tensor of numbers")
    tensor = attr(node, "value")
    if tensor.dtype not in dtypes.STORAGE:
        raise ctx.unsupported(node, f"a constant of type {tensor.dtype.name}")
    return Known(tensor.dtype, tensor=tensor)


def _convert_registered(ctx: Context, node: ir.Node) -> bool:
    candidates = converters(node.domain, node.op_type, ctx.target.kind if ctx.target else None)
    if not candidates:
        return False
    args = [ctx.expr(v) for v in node.inputs]
    for function in candidates:
        result = function(ctx, node, *args)
        if result is NotImplemented:
            continue
        bind_outputs(ctx, node, result)
        return True
    return False


def bind_outputs(ctx: Context, node: ir.Node, result: Any) -> None:
    """Makes a converter's result known as the node's outputs."""
    results = result if isinstance(result, list | tuple) else [result]
    types = output_dtypes(ctx, node)
    for output, item, dtype in zip(node.outputs, results, types):
        if isinstance(item, Known):
            ctx.scope.values[output] = item
        elif item is not None:
            ctx.scope.values[output] = _known(ctx, _as_annotated(ctx, output, item), dtype)


def _as_annotated(ctx: Context, value: ir.Value, expr: relax.Expr) -> relax.Expr:
    """The result with the dimensions the model states for it, where conversion found only something complicated.

    An exporter may know that a slice of 512 positions to ``seq`` has ``seq`` elements, because it knows that ``seq`` is at
    most 512; conversion knows ``min(seq, 512)``. The model's word is taken, and checked when the program runs.
    """
    if value.shape is None or len(value.shape) != ctx.rank(expr):
        return expr
    shape = ctx.shape(expr)
    stated = list(shape)
    for i, (d, annotation) in enumerate(zip(shape, value.shape)):
        if isinstance(d, int) or (isinstance(d, tirx.Var) and d not in ctx.dims.run_time):
            continue
        name = annotation if isinstance(annotation, int) else annotation.value
        known = name if isinstance(name, int) or name is None else ctx.dims.known(str(name))
        if known is not None and ctx.dims.over_inputs(known) and not ctx.dims.equal(known, d):
            stated[i] = known
    if all(a is b for a, b in zip(stated, shape)):
        return expr
    for d, known in zip(shape, stated):
        ctx.require_equal(d, known)
    return ctx.bb.emit(relax.op.reshape(expr, relax.ShapeExpr([as_expr(d) for d in stated])))


def _known(ctx: Context, item: relax.Expr, dtype: ir.DataType | None) -> Known:
    if not isinstance(item, relax.Var):
        item = ctx.bb.emit(item)
    storage = ctx.storage(item)
    if dtype is None or dtypes.STORAGE.get(dtype) != storage:
        dtype = dtypes.native(storage)
    return Known(dtype, expr=item)


def _expand(ctx: Context, node: ir.Node) -> bool:
    """Converts the body of the function the node calls: the model's own, else the specification's."""
    function = ctx.functions.get(node.op_identifier())
    if function is None:
        function = specified_function(ctx, node)
    if function is None:
        return False
    call_function(ctx, node, function)
    return True


def call_function(ctx: Context, node: ir.Node, function: ir.Function) -> None:
    """Converts a function's body with the node's inputs and attributes as its arguments."""
    function = function.clone()
    stated = {name: a for name, a in function.attributes.items() if a.value is not None}
    _resolve_attributes(function, node, {**default_attributes(ctx, node), **stated})
    inner = Scope(dict(function.opset_imports))
    for i, formal in enumerate(function.inputs):
        actual = node.inputs[i] if i < len(node.inputs) else None
        if actual is not None:
            inner.values[formal] = ctx.known(actual)
            continue
        for user, index in list(formal.uses()):
            user.replace_input_with(index, None)
    outer, ctx.scope = ctx.scope, inner
    try:
        convert_nodes(ctx, function)
        results = [ctx.known(v) for v in function.outputs[: len(node.outputs)]]
    finally:
        ctx.scope = outer
    for output, result in zip(node.outputs, results):
        outer.values[output] = result


def _resolve_attributes(function: ir.Function, call: ir.Node, formals: Any) -> None:
    """Replaces references to the function's attributes by the values of the call, or the defaults; drops absent ones."""
    for node in function.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref():
                continue
            formal = attribute.ref_attr_name or ""
            actual = call.attributes.get(formal) or formals.get(formal)
            if actual is None or actual.value is None:
                del node.attributes[name]
            else:
                node.attributes[name] = ir.Attr(name, actual.type, actual.value)
