"""Scheduled kernels against the plain loops they come from, over odd and dynamic shapes, for every vector length."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from qcompile.codegen.kernels.x86.harness import TARGETS
from qcompile.codegen.relax.pipeline import compile_relax, lower
from qcompile.codegen.relax.schedule_cpu import schedule_functions
from qcompile.targets.target import Target

op, nn = relax.op, relax.op.nn


class Program:
    """Inputs, and the expressions of all outputs, by name."""

    def __init__(self) -> None:
        self.bb = relax.BlockBuilder()
        self.inputs: list[relax.Var] = []
        self.outputs: dict[str, relax.Expr] = {}
        self.extents = {name: tirx.Var(name, "int64") for name in ("m", "n")}

    def tensor(self, *shape: object, dtype: str = "float32") -> relax.Var:
        extents = [self.extents[e] if isinstance(e, str) else e for e in shape]
        self.inputs.append(relax.Var(f"x{len(self.inputs)}", relax.TensorType(extents, dtype)))
        return self.inputs[-1]

    def module(self, build: object) -> tvm.IRModule:
        values = build(self)  # type: ignore[operator]
        with self.bb.function("main", self.inputs):
            with self.bb.dataflow():
                for name, make in values.items():
                    self.outputs[name] = self.bb.emit(make())
                result = self.bb.emit_output(relax.Tuple(list(self.outputs.values())))
            self.bb.emit_func_output(result)
        return self.bb.get()


def elementwise(p: Program) -> dict:
    x, b, row = p.tensor("m", 37), p.tensor(37), p.tensor("m", 1)
    big, tiny, flat = p.tensor("m", 5, 33), p.tensor("m", 12, 1), p.tensor("n")
    ints = p.tensor("m", 37, dtype="int32")
    one = relax.const(1.0)
    emit = p.bb.emit
    return {
        "gelu": lambda: nn.gelu(emit(op.add(x, b))),
        "chain": lambda: op.multiply(emit(op.tanh(emit(op.subtract(x, row)))), emit(nn.silu(x))),
        "exp": lambda: op.exp(emit(op.negative(big))),
        "sigmoid": lambda: op.sigmoid(tiny),
        "flat": lambda: op.add(emit(op.sqrt(emit(op.abs(flat)))), one),
        "where": lambda: op.where(emit(op.greater(x, row)), x, emit(op.add(x, one))),
        "cast": lambda: op.astype(emit(op.multiply(ints, ints)), "float32"),
        "power": lambda: op.add(emit(op.power(x, relax.const(3.0))), emit(op.power(x, relax.const(2.0)))),
        "erf": lambda: op.erf(big),
    }


def movement(p: Program) -> dict:
    x, big, small = p.tensor("m", 37), p.tensor("m", 5, 33), p.tensor(3, 4, 50, "m")
    ids = p.tensor("n", dtype="int64")
    emit = p.bb.emit
    return {
        "transpose": lambda: op.permute_dims(x, [1, 0]),
        "rotate": lambda: op.permute_dims(big, [2, 0, 1]),
        "swap": lambda: op.permute_dims(big, [1, 0, 2]),
        "four": lambda: op.permute_dims(small, [0, 3, 1, 2]),
        "concat": lambda: op.concat([x, emit(op.negative(x)), x], axis=1),
        "slice": lambda: op.strided_slice(big, axes=[2], begin=[3], end=[30], strides=[2]),
        "take": lambda: op.take(emit(op.permute_dims(x, [1, 0])), ids, axis=0),
        "reshaped": lambda: nn.relu(emit(op.reshape(big, (p.extents["m"] * 5, 33)))),
        "broadcast": lambda: op.broadcast_to(x, (4, p.extents["m"], 37)),
    }


def reductions(p: Program) -> dict:
    x, big, long = p.tensor("m", 37), p.tensor("m", 5, 33), p.tensor(3, "n")
    ints = p.tensor("m", 37, dtype="int32")
    gamma = p.tensor(33)
    emit = p.bb.emit
    return {
        "softmax": lambda: nn.softmax(x, -1),
        "softmax_middle": lambda: nn.softmax(big, 1),
        "log_softmax": lambda: nn.log_softmax(x, -1),
        "sum_rows": lambda: op.sum(x, [0]),
        "sum_columns": lambda: op.sum(long, [1]),
        "sum_ends": lambda: op.sum(big, [0, 2]),
        "sum_all": lambda: op.sum(big),
        "mean": lambda: op.subtract(x, emit(op.mean(x, [-1], True))),
        "max": lambda: op.max(big, [2]),
        "min": lambda: op.min(big, [1], True),
        "product": lambda: op.prod(x, [1]),
        "variance": lambda: op.variance(x, [-1]),
        "argmax": lambda: op.argmax(x, 1),
        "int_sum": lambda: op.sum(ints, [1]),
        "layer_norm": lambda: nn.layer_norm(big, gamma, gamma, [-1]),
        "rms_norm": lambda: nn.rms_norm(big, gamma, [-1]),
        "exp_sum": lambda: op.sum(emit(op.exp(x)), [1]),
    }


def products(p: Program) -> dict:
    x, w, wt, b = p.tensor("m", 37), p.tensor(37, 45), p.tensor(45, 37), p.tensor(45)
    q, k = p.tensor(2, 3, "m", 20), p.tensor(2, 3, "n", 20)
    v = p.tensor(37)
    emit = p.bb.emit
    return {
        "dense": lambda: nn.relu(emit(op.add(emit(op.matmul(x, w)), b))),
        "transposed": lambda: op.matmul(x, emit(op.permute_dims(wt, [1, 0]))),
        "scores": lambda: op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))),
        "vector": lambda: op.matmul(x, v),
        "gelu": lambda: nn.gelu(emit(op.matmul(x, w))),
        "einsum": lambda: op.einsum((x, x), "ij,ik->jk"),
    }


def convolutions(p: Program) -> dict:
    im, w, dw = p.tensor("m", 6, 19, 23), p.tensor(10, 6, 3, 3), p.tensor(6, 1, 5, 5)
    seq, sw = p.tensor("m", 6, 40), p.tensor(8, 3, 4)
    pw = p.tensor(7, 6, 1, 1)
    emit = p.bb.emit
    return {
        "same": lambda: nn.relu(emit(nn.conv2d(im, w, padding=(1, 1)))),
        "stride": lambda: nn.conv2d(im, w, strides=(2, 2), padding=(1, 0)),
        "dilated": lambda: nn.conv2d(im, w, dilation=(2, 2)),
        "depthwise": lambda: nn.conv2d(im, dw, padding=(2, 2), groups=6),
        "pointwise": lambda: nn.conv2d(im, pw),
        "one": lambda: nn.conv1d(seq, sw, strides=2, groups=2),
        "pool": lambda: nn.max_pool2d(im, (3, 3), (2, 2), (1, 1)),
        "average": lambda: nn.avg_pool2d(im, (2, 2), (2, 2)),
        "last": lambda: nn.conv2d(emit(op.permute_dims(im, [0, 2, 3, 1])), w, data_layout="NHWC", kernel_layout="OIHW"),
    }


PROGRAMS = [elementwise, movement, reductions, products, convolutions]
EXTENTS = [{"m": 1, "n": 1}, {"m": 3, "n": 130}, {"m": 67, "n": 9}]


def arguments(p: Program, extents: dict[str, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(extents.values()))
    made = []
    for x in p.inputs:
        shape = [extents[e.name] if isinstance(e, tirx.Var) else int(e) for e in x.ty.shape.values]
        dtype = str(x.ty.dtype)
        if dtype == "float32":
            made.append(rng.standard_normal(shape).astype(dtype))
        else:
            made.append(rng.integers(0, 37, shape).astype(dtype))
    return made


def outputs(executable: object, arrays: list[np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return [out.numpy() for out in machine["main"](*(tvm.runtime.tensor(a) for a in arrays))]


@pytest.mark.parametrize("build", PROGRAMS, ids=lambda f: f.__name__)
def test_scheduled_equals_plain(build: object) -> None:
    p = Program()
    module = p.module(build)
    plain = compile_relax(module, TARGETS[0], schedule=False)
    made = {target: compile_relax(module, target) for target in (*TARGETS, replace(TARGETS[0], cores=4))}
    for extents in EXTENTS:
        arrays = arguments(p, extents)
        want = outputs(plain, arrays)
        for target, executable in made.items():
            for name, a, b in zip(p.outputs, outputs(executable, arrays), want):
                where = f"{name} for {target} at {extents}"
                if b.dtype.kind == "f":
                    np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6 * np.abs(b).max(initial=1), err_msg=where)
                else:
                    np.testing.assert_array_equal(a, b, err_msg=where)


def softmax_where_nan_wins(x: te.Tensor) -> te.Tensor:
    """The maximum as ONNX wants it, in a reducer of its own."""
    m, n = x.shape

    def larger(a: object, b: object) -> object:
        return tirx.Select(tirx.Or(a > b, tirx.isnan(a)), a, b)

    peak_of = te.comm_reducer(larger, lambda dtype: tirx.const(float("-inf"), dtype), name="peak")
    k = te.reduce_axis((0, n), "k")
    peak = te.compute((m,), lambda i: peak_of(x[i, k], axis=k), name="peak")
    power = te.compute((m, n), lambda i, j: te.exp(x[i, j] - peak[i]), name="power")
    j = te.reduce_axis((0, n), "j")
    total = te.compute((m,), lambda i: te.sum(power[i, j], axis=j), name="total")
    return te.compute((m, n), lambda i, j: power[i, j] / total[i], name="softmax")


def run_te(compute: object, target: Target, x: np.ndarray) -> tuple[np.ndarray, str]:
    given = te.placeholder((te.var("m", dtype="int64"), tirx.IntImm("int64", x.shape[1])), str(x.dtype), name="x")
    out = compute(given)  # type: ignore[operator]
    function = te.create_prim_func([given, out]).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    scheduled, skipped = schedule_functions(tvm.IRModule({"main": function}), target)
    assert not skipped
    y = tvm.runtime.empty(x.shape, str(out.dtype))
    tvm.compile(scheduled, target=target.tvm())["main"](tvm.runtime.tensor(x), y)
    return y.numpy(), scheduled["main"].script()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_maximum_that_lets_nan_win_is_vectorised(target: Target) -> None:
    x = np.random.default_rng(0).standard_normal((5, 77)).astype(np.float32)
    x[2, 60] = np.nan
    x[3] = -np.inf
    got, script = run_te(softmax_where_nan_wins, target, x)
    with np.errstate(invalid="ignore"):
        power = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(got, power / power.sum(1, keepdims=True), rtol=1e-5)
    assert "T.vectorized" in script and "T.exp" not in script


def test_emulated_types_keep_their_meaning() -> None:
    """bfloat16 is emulated by passes that run after scheduling."""
    import ml_dtypes

    x = np.random.default_rng(1).standard_normal((4, 40)).astype(ml_dtypes.bfloat16)

    def exponential(given: te.Tensor) -> te.Tensor:
        return te.compute(given.shape, lambda i, j: te.exp(given[i, j].astype("float32")), name="e")

    got, _ = run_te(exponential, TARGETS[0], x)
    np.testing.assert_allclose(got, np.exp(x.astype(np.float32)), rtol=1e-5)


def test_what_is_no_nest_keeps_its_loops_and_says_why() -> None:
    def scan(given: te.Tensor) -> te.Tensor:
        def body(ins: list, outs: list) -> object:
            with IRBuilder() as builder:
                with T.serial(given.shape[0]) as i:
                    T.buffer_store(outs[0], T.exp(ins[0][i, 0]), [i, 0])
                return builder.get()

        return te.extern([given.shape], [given], body, dtype="float32", name="scan")

    given = te.placeholder((6, 1), "float32", name="x")
    function = te.create_prim_func([given, scan(given)]).with_attr("global_symbol", "main")
    scheduled, skipped = schedule_functions(tvm.IRModule({"main": function}), TARGETS[0])
    assert "where a block was expected" in skipped["main"]
    x = np.linspace(-2, 2, 6, dtype=np.float32)[:, None]
    y = tvm.runtime.empty((6, 1), "float32")
    tvm.compile(scheduled, target=TARGETS[0].tvm())["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_allclose(y.numpy(), np.exp(x), rtol=1e-6)


@pytest.mark.parametrize("build", PROGRAMS, ids=lambda f: f.__name__)
def test_little_is_left_unscheduled(build: object) -> None:
    module = lower(Program().module(build))
    _, skipped = schedule_functions(module, TARGETS[0])
    assert not skipped
