"""Whole programs for CUDA on a machine without one: what is called by name is in the sources, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile import ort, tensors
from qcompile.backends.cpu import save_onnx
from qcompile.codegen.kernels.cuda.plan import Plan
from qcompile.codegen.program_cuda import build_cuda_program
from qcompile.codegen.relax import compile_relax, to_relax
from qcompile.codegen.relax.testing import parse
from qcompile.errors import InputError, TargetError
from qcompile.passes.asks.online import Diagonal, Kronecker, insert_online
from qcompile.passes.lower import lower
from qcompile.passes.recognise import recognise
from qcompile.quantization import quantize_model
from qcompile.recipes import get_recipe
from qcompile.report import Report
from qcompile.runtime import Checked, TensorSpec
from qcompile.runtime_cuda import CudaProgram
from qcompile.targets import get_target

from .models import float_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))


def quantized(recipe: str, **changes: str) -> ir.Model:
    """The same, rounded to nearest."""
    graph, _ = recognise(float_model())
    chosen = replace(get_recipe(recipe), **changes)
    return quantize_model(graph, chosen, {}, Report("m", "cuda", recipe), lambda name: None)


@pytest.mark.parametrize("recipe", ["w8a8-rtn", "w8a16"])
def test_sources_hold_what_is_called(recipe: str) -> None:
    target = get_target("cuda", variant="sm_90a")
    program = build_cuda_program(lower(quantized(recipe)), target)
    text = "".join(path.read_text() for path in program.sources)
    assert "linear_80x48" in text and "__launch_bounds__" in text
    assert "rowwise_rmsnorm_48" in text
    assert program.kernels["row-wise rmsnorm"] == 1
    assert {"workspace.partial", "workspace.arrived"} <= set(program.params)
    assert [str(s) for s in program.inputs] == ["x: float32[rows, 48]"]


def mixed(left: int, right: int) -> ir.Model:
    """With a Kronecker product between norm and projection, as FlatQuant puts it, and signs before it."""
    graph, _ = recognise(float_model())
    (node,) = (n for n in graph.graph if n.op_type == "MatMul")
    rng = np.random.default_rng(0)
    jobs = {node.inputs[0].name: [node.name]}
    insert_online(graph, jobs, Diagonal(rng.choice([-1.0, 1.0], 48), "signed"))
    jobs = {node.inputs[0].name: [node.name]}
    insert_online(graph, jobs, Kronecker(*(np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (left, right))))
    return quantize_model(graph, get_recipe("w8a8-rtn"), {}, Report("m", "cuda", "w8a8-rtn"), lambda name: None)


def test_kronecker_products_are_fused() -> None:
    target = get_target("cuda", variant="sm_90a")
    program = build_cuda_program(lower(mixed(6, 8), factors=True), target)
    assert program.kernels["row-wise rmsnorm, Kronecker"] == 1
    text = "".join(path.read_text() for path in program.sources)
    assert "rowwise_rmsnorm_48" in text and "gain" in text and "factor" in text
    parts = {name.rsplit(".", 1)[1] for name in program.params}
    assert {"left", "right", "gain"} <= parts


def test_other_products_stay_with_relax() -> None:
    lowered = lower(mixed(6, 8), factors=True, mixes=lambda width, sizes: (width, sizes) != (48, (6, 8)))
    assert "Kronecker" in {node.op_type for node in lowered.graph}
    program = build_cuda_program(lowered, get_target("cuda", variant="sm_90a"))
    assert "row-wise rmsnorm, Kronecker" not in program.kernels and program.linears


@pytest.mark.parametrize("recipe, weight", [("w8a16", "nf4"), ("w8a16", "mxfp4"), ("w8a8-rtn", "dual4/g32")])
def test_weights_that_are_no_integers(recipe: str, weight: str) -> None:
    program = build_cuda_program(lower(quantized(recipe, weight=weight)), get_target("cuda", variant="sm_90a"))
    (record,) = program.linears
    assert str(record.problem.weight) == weight
    packed = {name.rsplit(".", 1)[1] for name in program.params if not name.startswith("workspace.")}
    assert {"codes", "column"} <= packed and ("table" in packed) == (weight != "dual4/g32")


WEIGHTS = [
    ("w8a16", "int4/g16"), ("w8a16", "int3/g32/asym"), ("w8a16", "int8/asym"), ("w8a16", "nf4/g64"), ("w8a16", "codebook4"),
    ("w8a16", "mxfp8"), ("w8a8-rtn", "int8"), ("w8a8-rtn", "int3"), ("w8a8-rtn", "int4/g32/asym"), ("w8a8-rtn", "int2/asym"),
    ("w8a8-rtn", "dual4/g32"),
]  # fmt: skip


@pytest.mark.parametrize("recipe, weight", WEIGHTS)
def test_model_reads_the_packed_weights(
    recipe: str, weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``model.onnx`` holds no weights of its own, and means what the quantized stage means."""
    monkeypatch.setattr(Plan, "functions", lambda self, prefix="": {})  # no code is looked at
    monkeypatch.setattr(Plan, "clusters", lambda self, prefix="": {})
    model = quantized(recipe, weight=weight)
    program = build_cuda_program(lower(model), get_target("cuda", variant="sm_90a"))
    arrays = {name: a for name, a in program.params.items() if not name.startswith("workspace.")}
    placed = tensors.save(tmp_path / "weights.safetensors", arrays)
    save_onnx(program, placed, model, tmp_path)
    emitted = ir.load(tmp_path / "model.onnx")
    own = [v for v in emitted.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    assert max(v.const_value.size for v in own) < 1000 < 48 * 80
    assert {v.const_value.location for v in emitted.graph.initializers.values() if v not in own} == {
        "weights.safetensors"
    }
    x = np.random.default_rng(0).standard_normal((7, 48)).astype(np.float32)
    want = ort.run(ort.session(model), {"x": x})["y"]
    got = ort.run(ort.session(tmp_path / "model.onnx"), {"x": x})["y"]
    assert np.linalg.norm(got - want) <= 2.0**-11 * np.linalg.norm(want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_target_without_a_device_asks_for_an_architecture() -> None:
    with pytest.raises(TargetError, match="sm_90a"):
        get_target("cuda")
    assert get_target("cuda", variant="sm_80").kind == "cuda"


def test_shapes_are_checked_on_the_host() -> None:
    """Positions of a table added to rows, as BERT does: that the sequence is no longer than the table is checked without reading
    a tensor, for which a captured call may not wait. The module has no kernels of its own and runs on the CPU."""
    import tvm
    from tvm import relax

    table = np.arange(24, dtype=np.float32).reshape(1, 6, 4)
    values = ", ".join(map(str, table.reshape(-1)))
    constants = f"float[1, 6, 4] table = {{{values}}}, int64[1] zero = {{0}}, int64[1] axis = {{1}}"
    body = f"""
    m (float[b, s, 4] x) => (float[b, s, 4] y) <{constants}> {{
      end = Shape<start=1, end=2>(x)
      positions = Slice(table, zero, end, axis)
      y = Add(x, positions)
    }}"""
    program = to_relax(ir.from_proto(parse(body)), target=get_target("cuda", variant="sm_90a"))
    assert "tensor_to_shape" not in program.mod.script()
    machine = relax.VirtualMachine(compile_relax(program, None, schedule=False, opt_level=0), tvm.cpu())
    for length in (1, 5, 6):
        x = np.random.default_rng(length).standard_normal((2, length, 4)).astype(np.float32)
        y = machine["main"](tvm.runtime.tensor(x), *map(tvm.runtime.tensor, program.params.values())).numpy()
        assert np.array_equal(y, x + table[:, :length])
    with pytest.raises(Exception, match=r"(?i)shape|match"):
        machine["main"](
            tvm.runtime.tensor(np.zeros((1, 7, 4), np.float32)), *map(tvm.runtime.tensor, program.params.values())
        )


def test_inputs_are_checked_before_a_device_has_them() -> None:
    program = object.__new__(CudaProgram)
    Checked.__init__(program, [TensorSpec("x", "float32", ("b", 4)), TensorSpec("y", "int64", ("b",))], [])
    program.device = torch.device("cpu")
    program.run_torch = lambda feeds: dict(zip("xy", program._placed(feeds), strict=True))  # type: ignore[method-assign]
    x, y = torch.ones(2, 4), np.arange(2)
    for given in (program(x, y), program(x, y=y), program({"y": y, "x": x})):
        assert torch.equal(given[0], x) and torch.equal(given[1], torch.tensor([0, 1]))
    for args, named, message in (
        ((x, y, y), {}, "got 3 inputs, the model takes 2"),
        ((x, y), {"x": x}, "'x' is given twice"),
        ((x, y), {"z": y}, "no input 'z'"),
        ((x,), {}, "'y' is missing"),
        ((x.half(), y), {}, "'x' is float16"),
        ((x[:, :3], y), {}, "'x' has 3 along axis 1"),
        ((x, y[:1]), {}, "b is 2 in 'x' but 1 in 'y'"),
        ((x, y[None]), {}, r"'y' has shape \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            program(*args, **named)
