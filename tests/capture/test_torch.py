"""Modules, exported programs and references to them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qcompile import ort
from qcompile.capture import capture
from qcompile.capture.parity import check_parity
from qcompile.errors import ModelError, UnsupportedOperatorError

torch = pytest.importorskip("torch")


class Perceptron(torch.nn.Module):
    """Two linear operators and a second input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x))) * scale


SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.project(x)

def build():
    return Net(), (torch.zeros(2, 4),)

ready = Net()
ready.example_inputs = (torch.zeros(2, 4),)
number = 3
def broken():
    raise RuntimeError("no weights here")
"""


def test_module_with_symbolic_batch() -> None:
    module = Perceptron().train()
    captured = capture(module, example_inputs=(torch.randn(1, 6), torch.randn(1, 3)))
    assert module.training, "the module is left as it was"
    assert captured.input_names == ["x", "scale"]
    assert {"up.weight", "up.bias", "down.weight", "down.bias"} <= set(captured.model.graph.initializers)
    assert captured.source["parity"]["examples"] == 2 and captured.source["architecture"] == "Perceptron"
    x, scale = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32), None
    x, scale = x[0], np.ones((5, 3), np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x), torch.from_numpy(scale)).numpy()
    (got,) = ort.run(captured.model, {"x": x, "scale": scale}).values()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_static_shapes() -> None:
    captured = capture(Perceptron(), example_inputs=(torch.randn(1, 6), torch.randn(1, 3)), dynamic=False)
    assert [d for d in captured.model.graph.inputs[0].shape] == [1, 6]


def test_exported_program() -> None:
    program = torch.export.export(Perceptron().eval(), (torch.randn(2, 6), torch.randn(2, 3)))
    captured = capture(program)
    assert captured.source["kind"] == "exported-program" and captured.source["parity"]["max_rel_error"] < 1e-5
    assert captured.example_inputs is not None and set(captured.example_inputs) == {"x", "scale"}


@pytest.mark.parametrize("attribute", ["build", "ready"])
def test_reference_to_a_file(tmp_path: Path, attribute: str) -> None:
    file = tmp_path / f"user_model_{attribute}.py"
    file.write_text(SOURCE)
    before = list(sys.path)
    captured = capture(f"{file}:{attribute}")
    assert captured.input_names == ["x"] and "project.weight" in captured.model.graph.initializers
    assert sys.path == before


def test_what_a_file_imports_beside_it_may_be_imported_late(tmp_path: Path) -> None:
    (tmp_path / "helper_of_late.py").write_text(SOURCE)
    file = tmp_path / "late_model.py"
    file.write_text("def build():\n    from helper_of_late import build\n\n    return build()\n")
    before = list(sys.path)
    assert capture(f"{file}:build").input_names == ["x"]
    assert sys.path == before


@pytest.mark.parametrize(
    ("attribute", "match"),
    [
        ("number", "is a int, not a torch"),
        ("missing", "no attribute 'missing'"),
        ("broken", "RuntimeError: no weights"),
    ],
)
def test_reference_to_something_else(tmp_path: Path, attribute: str, match: str) -> None:
    file = tmp_path / "user_model_bad.py"
    file.write_text(SOURCE)
    with pytest.raises(ModelError, match=match):
        capture(f"{file}:{attribute}")


@pytest.mark.parametrize("text", ["no_such_package_xyz:model", "no/such/file.py:model"])
def test_reference_to_nothing(text: str) -> None:
    with pytest.raises(ModelError, match=r"no_such|not found"):
        capture(text)


def test_module_without_example_inputs() -> None:
    with pytest.raises(ModelError, match="example inputs are needed"):
        capture(Perceptron())


def test_operator_without_onnx_form() -> None:
    class Eigen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eig(x)[0].real

    with pytest.raises(UnsupportedOperatorError, match="linalg_eig"):
        capture(Eigen(), example_inputs=(torch.randn(2, 3, 3),))


def test_batch_that_cannot_vary() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Parameter(torch.randn(2, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.offset

    with pytest.raises(ModelError, match="dynamic=False"):
        capture(Fixed(), example_inputs=(torch.randn(2, 8),))


def test_parity_refuses_another_graph() -> None:
    module = Perceptron().eval()
    inputs = (torch.randn(2, 6), torch.randn(2, 3))
    model = capture(module, example_inputs=inputs, check=False).model
    bias = model.graph.initializers["down.bias"]
    import onnx_ir as ir

    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.1), name="down.bias")
    with pytest.raises(ModelError, match="differs from torch"):
        check_parity(model, module, [inputs], "Perceptron")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_of_half_precision_is_captured_in_float32(dtype: torch.dtype) -> None:
    module = Perceptron().to(dtype)
    captured = capture(module, example_inputs=(torch.randn(2, 6, dtype=dtype), torch.randn(2, 3, dtype=dtype)))
    assert module.up.weight.dtype == dtype, "the module is left as it was"
    assert captured.source["weights"] == str(dtype).removeprefix("torch.")
    assert {str(value.dtype) for value in (*captured.model.graph.inputs, *captured.model.graph.outputs)} == {"FLOAT"}
    up = captured.model.graph.initializers["up.weight"].const_value.numpy()
    np.testing.assert_array_equal(np.sort(up, axis=None), np.sort(module.up.weight.detach().float().numpy(), axis=None))


def test_an_exported_program_of_half_precision_says_what_to_do() -> None:
    program = torch.export.export(Perceptron().bfloat16(), (torch.ones(2, 6).bfloat16(), torch.ones(2, 3).bfloat16()))
    with pytest.raises(ModelError, match=r"computes in bfloat16; pass the module itself"):
        capture(program)


def test_outputs_are_named_as_in_the_dictionary_that_is_returned() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.up(x).relu(), "hidden": self.up(x)}

    assert capture(Two(), example_inputs=(torch.randn(2, 6),)).output_names == ["scores", "hidden"]
    Two.forward = lambda self, x: {"x": self.up(x)}  # the name of the input
    assert capture(Two(), example_inputs=(torch.randn(2, 6),)).output_names != ["x"]
