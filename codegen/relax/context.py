"""What a converter works with: the block builder, what is known about values, and helpers to emit kernels.

A value of the model is known in one of these ways, strongest first:

* as a constant (a tensor of the model, or the result of folding);
* as a *symbolic value*: a small integer tensor whose elements are expressions of the program's dimensions, which is what
  ``Shape`` returns and what chains of ``Gather``, ``Concat``, ``Add`` ... on it compute;
* as a Relax expression whose shape is fully known (integers and expressions), but not its contents;
* as a list of expressions (an ONNX sequence of statically known length), or as absent (an empty optional).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, te, tirx
from tvm.te import Tensor

from qcompile.codegen.relax import dtypes
from qcompile.codegen.relax.dims import Dim, DimArithmetic, as_expr
from qcompile.errors import UnsupportedOperatorError
from qcompile.targets.target import Target

#: The ``op_pattern`` of a kernel that is not merged with others.
OPAQUE_PATTERN = 8

#: Largest tensor, in elements, whose contents are followed symbolically.
SYMBOLIC_LIMIT = 512


@dataclass
class Known:
    """What conversion knows about one value (see the module's text)."""

    dtype: ir.DataType
    expr: relax.Expr | None = None
    constant: np.ndarray | None = None
    tensor: ir.TensorProtocol | None = None
    symbolic: np.ndarray | None = None
    sequence: list[Any] | None = None
    run_time: list[Dim] | None = None

    def is_constant(self) -> bool:
        """Whether the contents are known now."""
        return self.constant is not None or self.tensor is not None


@dataclass
class Scope:
    """One graph or function body being converted; looks outwards for values it does not define."""

    opsets: dict[str, int]
    parent: Scope | None = None
    values: dict[ir.Value, Known] = field(default_factory=dict)

    def find(self, value: ir.Value) -> Known | None:
        """What is known about a value here or in an enclosing scope."""
        scope: Scope | None = self
        while scope is not None:
            if value in scope.values:
                return scope.values[value]
            scope = scope.parent
        return None


class Context:
    """State of one conversion, handed to every converter.

    Attributes:
        bb: the Relax block builder, inside ``main``.
        dims: arithmetic on dimensions.
        target: what is compiled for, or ``None``.
        params: large constants turned into function parameters, in the order of their parameters.
        state: what families of converters keep during a conversion, each under a key of its own.
        made: what was made `once` for all functions of the module.
    """

    def __init__(self, target: Target | None, params_threshold: int, functions: dict[Any, ir.Function]) -> None:
        self.bb = relax.BlockBuilder()
        self.dims = DimArithmetic()
        self.target = target
        self.params: dict[str, np.ndarray] = {}
        self.param_vars: list[relax.Var] = []
        self.functions = functions
        self.state: dict[Any, Any] = {}
        self.made: dict[Any, Any] = {}
        self.scope = Scope({})
        self._params_threshold = params_threshold
        self._made_here: list[Known] = []

    def beside(self, functions: dict[Any, ir.Function]) -> Context:
        """For another function of the same module, with values and dimensions of its own."""
        other = Context(self.target, self._params_threshold, functions)
        other.bb, other.made = self.bb, self.made
        return other

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made once per ``key``: layers with equal shapes share a kernel."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    # -- what is known ------------------------------------------------------------------------------------------

    def known(self, value: ir.Value) -> Known:
        """The entry of a value; initializers enter when they are first looked at."""
        found = self.scope.find(value)
        if found is None:
            tensor = value.const_value
            if tensor is None:
                raise KeyError(f"value {value.name!r} has not been converted")
            found = Known(tensor.dtype, tensor=tensor)
            self.scope.values[value] = found
        return found

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The contents of a value if they are known at conversion (in numpy's own or ml_dtypes' type), else ``None``."""
        if value is None:
            return None
        known = self.known(value)
        if known.constant is None and known.tensor is not None:
            known.constant = known.tensor.numpy()
        return known.constant

    def symbolic(self, value: ir.Value | None) -> np.ndarray | None:
        """The contents of a small integer or bool value as an object array of integers and dimension expressions."""
        if value is None:
            return None
        known = self.known(value)
        if known.symbolic is None and known.is_constant():
            if known.dtype not in _SYMBOLIC_DTYPES:
                return None
            if known.tensor is not None and known.constant is None and known.tensor.size > SYMBOLIC_LIMIT:
                return None
            constant = self.constant(value)
            assert constant is not None
            if constant.size > SYMBOLIC_LIMIT:
                return None
            known.symbolic = object_array(constant)
        return known.symbolic

    def symbolic_or_dynamic(self, value: ir.Value) -> list[Dim]:
        """The elements of an integer vector as dimensions; those known at run time only become new variables.

        The new variables stand for whatever the tensor holds when the program runs, so they can be negative.
        """
        symbolic = self.symbolic(value)
        if symbolic is not None:
            return list(symbolic.reshape(-1))
        known = self.known(value)
        if known.run_time is None:
            known.run_time = self.dims_from_tensor(self.expr(value), value.name or "value")
            self._made_here.append(known)
        return list(known.run_time)

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The ONNX element type of a value."""
        return self.known(value).dtype

    def expr(self, value: ir.Value | None) -> Any:
        """The value as a Relax expression (a list of them for a sequence); emits what is needed. ``None`` stays ``None``."""
        if value is None:
            return None
        known = self.known(value)
        if known.sequence is not None:
            return known.sequence
        return self.tensor(known, value.name if value.is_initializer() else None)

    def tensor(self, known: Known, name: str | None = None) -> relax.Expr:
        """The expression of an entry that is not a sequence; ``name`` is for a constant that becomes a parameter."""
        if known.expr is None:
            if known.is_constant():
                array = known.constant if known.constant is not None else known.tensor.numpy()
                known.expr = self.const(dtypes.to_storage(array, known.dtype), name=name)
            else:
                assert known.symbolic is not None
                known.expr = self.materialize(known.symbolic, dtypes.STORAGE[known.dtype])
            self._made_here.append(known)
        return known.expr

    def version(self, node: ir.Node) -> int:
        """The opset version that gives the node its meaning."""
        if node.version is not None:
            return node.version
        domain = "" if node.domain == "ai.onnx" else node.domain
        return self.scope.opsets.get(domain, self.scope.opsets.get("ai.onnx", 1) if domain == "" else 1)

    # -- shapes -------------------------------------------------------------------------------------------------

    def shape(self, expr: relax.Expr) -> list[Dim]:
        """The dimensions of a tensor expression."""
        return [int(d) if isinstance(d, tirx.IntImm) else d for d in expr.ty.shape.values]

    def storage(self, expr: relax.Expr) -> str:
        """The storage dtype of a tensor expression."""
        return str(expr.ty.dtype)

    def rank(self, expr: relax.Expr) -> int:
        """The number of dimensions."""
        return len(expr.ty.shape.values)

    def new_dim(self, value: Dim, hint: str = "dim", *, condition: Any = None) -> Dim:
        """A short variable equal to a long expression (bound when the program runs), which stops unless ``condition`` holds."""
        if isinstance(value, int | tirx.Var) and condition is None:
            return value
        var = self.dims.run_time_var(hint)
        if condition is None:
            self._match([value], [var])
        else:
            self._match([value, tirx.Select(condition, as_expr(1), as_expr(0))], [var, as_expr(1)])
        return var

    def require(self, condition: Any) -> None:
        """Lets the program stop with an error unless a condition on dimensions holds.

        Raises:
            ValueError: it cannot hold.
        """
        condition = self.dims.analyzer.simplify(condition)
        if isinstance(condition, tirx.IntImm):
            if not int(condition):
                raise ValueError("dimensions or positions do not fit")
            return
        self._match([tirx.Select(condition, as_expr(1), as_expr(0))], [as_expr(1)])

    def _match(self, values: list[Dim], pattern: list[Any]) -> None:
        """Computes dimensions and matches them with a pattern when the program runs.

        The values go through a tensor, which hides them from passes that would substitute the pattern's variables by their
        definitions everywhere again, and whose simplifiers do not end on some of those. On a GPU reading a tensor would wait
        for the device, which a call that is captured in a CUDA graph may not: there they stay shapes of the host, and go through
        a function that passes do not look into.
        """
        if self.target is not None and self.target.kind == "cuda":
            shape = relax.ShapeExpr([as_expr(v) for v in values])
            hidden = relax.call_pure_packed("vm.builtin.copy", shape, ty_args=relax.ShapeType(ndim=len(values)))
        else:
            hidden = relax.op.tensor_to_shape(self.materialize(np.array(values, dtype=object), "int64"))
        self.bb.match_cast(self.bb.emit(hidden), relax.ShapeType(pattern))

    def require_equal(self, a: Dim, b: Dim) -> None:
        """Lets the program stop with an error unless the two dimensions are equal; nothing is emitted if they provably are."""
        if self.dims.equal(a, b):
            return
        if isinstance(a, int) and isinstance(b, int):
            raise ValueError(f"dimensions {a} and {b} differ")
        self.require(tirx.EQ(as_expr(a), as_expr(b)))

    def require_shape(self, expr: relax.Expr, shape: Sequence[Dim]) -> None:
        """:meth:`require_equal` for every dimension of a tensor."""
        for actual, wanted in zip(self.shape(expr), shape, strict=True):
            self.require_equal(actual, wanted)

    def dims_from_tensor(self, expr: relax.Expr, hint: str = "n") -> list[Dim]:
        """New variables for the elements of an integer tensor of static length, read when the program runs."""
        count = self.dims.product(self.shape(expr))
        if not isinstance(count, int):
            raise ValueError("a tensor used as a shape must have a static length")
        if count == 0:
            return []
        flat = self.cast(self.reshape(expr, [count]), "int64")
        shape = self.bb.emit(relax.op.tensor_to_shape(flat))
        variables = [self.dims.run_time_var(hint, signed=True) for _ in range(count)]
        self.bb.match_cast(shape, relax.ShapeType(variables))
        return variables

    def broadcast(self, *shapes: Sequence[Dim]) -> list[Dim]:
        """The shape numpy-style broadcasting gives; unprovable cases are decided (or refused) at run time."""
        rank = max((len(s) for s in shapes), default=0)
        padded = [[1] * (rank - len(s)) + list(s) for s in shapes]
        return [self._broadcast_dim(column) for column in zip(*padded)]

    def _broadcast_dim(self, column: Sequence[Dim]) -> Dim:
        result: Dim = 1
        for d in column:
            if (isinstance(d, int) and d == 1) or self.dims.equal(d, result):
                continue
            if isinstance(result, int) and result == 1:
                result = d
            elif isinstance(result, int) and isinstance(d, int):
                raise ValueError(f"dimensions {result} and {d} do not broadcast")
            elif isinstance(d, int) or isinstance(result, int):
                fixed, loose = (d, result) if isinstance(d, int) else (result, d)
                if not self.dims.provable(loose == 1):
                    self.require(tirx.Or(tirx.EQ(loose, as_expr(1)), tirx.EQ(loose, as_expr(fixed))))
                result = fixed
            else:
                a, b = as_expr(result), as_expr(d)
                chosen = tirx.Select(tirx.EQ(a, as_expr(1)), b, a)
                fits = tirx.Or(tirx.EQ(a, b), tirx.Or(tirx.EQ(a, as_expr(1)), tirx.EQ(b, as_expr(1))))
                result = self.new_dim(chosen, "broadcast", condition=fits)
        return result

    # -- emitting -----------------------------------------------------------------------------------------------

    def const(self, array: np.ndarray | float | int, dtype: str | None = None, name: str | None = None) -> relax.Expr:
        """A constant: embedded, or a parameter of the program when it has many elements."""
        array = np.asarray(array, dtype=dtypes.numpy_dtype(dtype) if dtype else None)
        if array.size >= self._params_threshold:
            return self.param(name or f"constant_{len(self.params)}", array)
        return relax.const(np.ascontiguousarray(array).reshape(array.shape), str(array.dtype))

    def param(self, name: str, array: np.ndarray) -> relax.Var:
        """A parameter of the program: passed to ``main`` after the inputs."""
        base, n = name, 0
        while name in self.params:
            if self.params[name] is array:
                return self.param_vars[list(self.params).index(name)]
            n += 1
            name = f"{base}_{n}"
        self.params[name] = array
        var = relax.Var(_identifier(name), relax.TensorType(list(array.shape), str(array.dtype)))
        self.param_vars.append(var)
        return var

    def emit(self, expr: relax.Expr, name: str = "") -> relax.Var:
        """Binds an expression to a new variable."""
        return self.bb.emit(expr, name)

    def te(
        self, function: Callable[..., Any], *args: relax.Expr, name: str = "", attrs: dict[str, Any] | None = None
    ) -> Any:
        """Emits a kernel written as a tensor expression.

        Args:
            function: takes one ``te.Tensor`` per argument, returns one or a list; may use the program's dimensions freely.
            args: tensor expressions.
            name: of the kernel.
            attrs: attributes of the PrimFunc, e.g. ``{"op_pattern": 8}`` to keep it from being fused.

        Returns:
            One variable, or a list if the function returned a list.
        """
        inputs = [te.placeholder(a.ty.shape.values, str(a.ty.dtype), name=f"x{i}") for i, a in enumerate(args)]
        result = function(*inputs)
        outputs = [result] if isinstance(result, te.Tensor) else list(result)
        free = self._free_vars(inputs, outputs)
        func = te.create_prim_func([*inputs, *free, *outputs])
        missing = [v for v in tirx.analysis.undefined_vars(func.body, func.params) if v not in free]
        missing = [v for v in missing if self.dims.owns(v) and not self._is_bound(v, inputs, outputs)]
        if missing:
            free = sorted([*free, *missing], key=lambda v: v.name)
            func = te.create_prim_func([*inputs, *free, *outputs])
        func = tvm.s_tir.renew_defs(func).without_attr("global_symbol")
        if attrs:
            func = func.with_attrs(attrs)
        if self._uses_run_time(inputs, outputs, free) or (free and not args):
            # Fusion may move a merged kernel to its first part, before such a variable is bound; and it makes a function
            # that TVM 0.27 cannot fuse of a kernel that reads dimensions only. Keep this one apart.
            func = func.with_attr("op_pattern", OPAQUE_PATTERN)
        specs: list[tuple[Sequence[Dim], str]] = [(list(t.shape), str(t.dtype)) for t in outputs]
        made = self.call_tir(func, list(args), specs, free, name=name or function.__name__)
        return made[0] if isinstance(result, te.Tensor) else made

    def _uses_run_time(self, inputs: list[Tensor], outputs: list[Tensor], free: list[tirx.Var]) -> bool:
        if not self.dims.run_time:
            return False
        dims = [d for t in [*inputs, *outputs] for d in t.shape if not isinstance(d, tirx.IntImm)]
        return any(not self.dims.over_inputs(d) for d in [*dims, *free])

    @staticmethod
    def _is_bound(var: tirx.Var, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        return any(d.same_as(var) for t in [*inputs, *outputs] for d in t.shape if isinstance(d, tirx.Var))

    def _free_vars(self, inputs: list[Tensor], outputs: list[Tensor]) -> list[tirx.Var]:
        """Variables of the shapes that no dimension binds by itself, by name."""
        bound: set[Any] = set()
        used: dict[Any, None] = {}
        for tensor in [*inputs, *outputs]:
            for d in tensor.shape:
                if isinstance(d, tirx.IntImm):
                    continue
                if isinstance(d, tirx.Var):
                    bound.add(d)
                else:
                    used.update(dict.fromkeys(tirx.analysis.undefined_vars(d)))
        return sorted((v for v in used if v not in bound), key=lambda v: v.name)

    @contextmanager
    def block(self) -> Iterator[Callable[[relax.Expr], relax.Expr]]:
        """Emits into a block of its own, e.g. a branch; calling what it yields with a result closes the block.

        What is emitted inside is known inside only.
        """
        outer, made = self.scope, self._made_here
        self.scope, self._made_here = Scope(outer.opsets, parent=outer), []
        self.bb._begin_binding_block()

        def finish(result: relax.Expr) -> relax.Expr:
            result = self.bb.normalize(result)
            return relax.SeqExpr([self.bb._end_block()], result)

        try:
            yield finish
        finally:
            for known in self._made_here:  # defined in this block: to be made anew outside
                known.run_time = None
                if known.is_constant() or known.symbolic is not None:
                    known.expr = None
            self.scope, self._made_here = outer, made

    def call_tir(
        self,
        func: tirx.PrimFunc,
        args: list[relax.Expr],
        outputs: list[tuple[Sequence[Dim], str]],
        tir_vars: Sequence[Dim] = (),
        name: str = "kernel",
    ) -> list[relax.Var]:
        """Emits a call of a PrimFunc whose parameters are the arguments, the scalars, then the outputs.

        Args:
            func: a PrimFunc in destination-passing style.
            args: tensors it reads.
            outputs: shape and dtype of each tensor it writes.
            tir_vars: int64 scalars passed after the tensors.
            name: of the function in the module.
        """
        var = self.bb.add_func(func, name)
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        call = relax.call_tir(var, [*args, *(as_expr(v) for v in tir_vars)], types[0] if len(types) == 1 else types)
        made = self.bb.emit(call, name)
        if len(types) == 1:
            return [made]
        return [self.bb.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def materialize(self, symbolic: np.ndarray, dtype: str) -> relax.Expr:
        """A tensor holding symbolic elements."""
        flat = list(symbolic.reshape(-1))
        if all(isinstance(e, int | float | bool) for e in flat):
            return self.const(np.array(flat, dtype=dtypes.numpy_dtype(dtype)).reshape(symbolic.shape))
        elements = [tirx.const(e, dtype) if isinstance(e, int | bool) else e.astype(dtype) for e in flat]
        strides = [int(np.prod(symbolic.shape[i + 1 :])) for i in range(symbolic.ndim)]

        def values(*index: Any) -> Any:
            position = sum((i * s for i, s in zip(index, strides)), as_expr(0))
            result = elements[-1]
            for k in range(len(elements) - 2, -1, -1):
                result = tirx.Select(position == k, elements[k], result)
            return result

        return self.te(lambda: te.compute(symbolic.shape, values, name="shape_value"), name="shape_value")

    # -- the few tensor helpers every family needs ----------------------------------------------------------------

    def reshape(self, expr: relax.Expr, shape: Sequence[Dim]) -> relax.Expr:
        """A view with another shape of as many elements."""
        old = self.shape(expr)
        if len(old) == len(shape) and all(self.dims.equal(a, b) for a, b in zip(old, shape)):
            return expr
        return self.bb.emit(relax.op.reshape(expr, relax.ShapeExpr([as_expr(d) for d in shape])))

    def cast(self, expr: relax.Expr, dtype: str) -> relax.Expr:
        """Conversion between storage dtypes as C does it; the expression itself if it has the dtype already."""
        if self.storage(expr) == dtype:
            return expr
        return self.te(
            lambda x: te.compute(x.shape, lambda *i: x[i].astype(dtype), name="cast"), expr, name=f"cast_{dtype}"
        )

    def unsupported(self, node: ir.Node, reason: str) -> UnsupportedOperatorError:
        """The error to raise for a node that cannot be converted, naming it and where it comes from."""
        return UnsupportedOperatorError(f"{describe(node)}: {reason}")


def describe(node: ir.Node) -> str:
    """Operator, node name and, where the exporter recorded it, the module of the source model."""
    operator = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    text = f"{operator} (node {node.name!r}" if node.name else f"{operator} (unnamed node"
    module = _module_path(node)
    return f"{text}, module {module})" if module else text + ")"


def _module_path(node: ir.Node) -> str:
    """The path of the module a node was exported from; torch's exporter writes it as a list of nested scopes."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if scopes:
        try:
            *modules, _operation = ast.literal_eval(scopes)
            return next((m for m in reversed(modules) if m), "")
        except (ValueError, SyntaxError):
            return scopes
    return node.metadata_props.get("namespace", "")


def object_array(array: np.ndarray) -> np.ndarray:
    """An object array of Python integers, floats or bools with the contents of ``array``."""
    result = np.empty(array.shape, dtype=object)
    result.reshape(-1)[:] = array.reshape(-1).tolist()
    return result


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


_D = ir.DataType
_SYMBOLIC_DTYPES = frozenset(
    {_D.INT64, _D.INT32, _D.BOOL, _D.UINT8, _D.INT8, _D.INT16, _D.UINT32, _D.UINT64, _D.UINT16}
)
