"""Files and modules that are not models must end in one line that says what is wrong and where."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.capture import capture
from qcompile.errors import ModelError, QcompileError, UnsupportedOperatorError


def linear_model(weight: np.ndarray | None = None, *nodes: onnx.NodeProto, opset: int = 18) -> onnx.ModelProto:
    """``y = x @ w`` or the given nodes, with ``x`` of shape (batch, 4)."""
    weight = np.arange(16, dtype=np.float32).reshape(4, 4) if weight is None else weight
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("MatMul", ["x", "w"], ["y"], name="project")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        initializer=[numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def save_external(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    """A model whose weight is in ``weights.bin`` beside it."""
    path = folder / "model.onnx"
    onnx.save(model or linear_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def set_external(path: Path, **entries: str) -> None:
    """Overwrite entries of the first tensor's external-data record."""
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key in entries:
            entry.value = entries.pop(entry.key)
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def message(error: pytest.ExceptionInfo[QcompileError]) -> str:
    text = str(error.value)
    assert "\n" not in text, "errors are one line"
    return text


def test_a_good_model_passes(tmp_path: Path) -> None:
    captured = capture(save_external(tmp_path))
    assert captured.input_names == ["x"]
    assert set(captured.source["files"]) == {"model.onnx", "weights.bin"}


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 64, b'{"json": true}'])
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        capture(path)
    assert "model.onnx" in message(error)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = linear_model().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(QcompileError) as error:
            capture(path)
        assert "model.onnx" in message(error)


def test_flipped_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    whole = bytearray(linear_model().SerializeToString())
    rng = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    for position in rng.permutation(len(whole))[: int(os.environ.get("FLIPS", 120))]:
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged))
        try:
            capture(path)
        except QcompileError as error:
            assert "\n" not in str(error)


def test_missing_file() -> None:
    with pytest.raises(ModelError, match="no such file"):
        capture("does/not/exist.onnx")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickled"):
        capture(path)


def test_external_data_missing(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError) as error:
        capture(path)
    assert "'w'" in message(error) and "weights.bin" in message(error) and "missing" in message(error)


def test_external_data_short(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError) as error:
        capture(path)
    assert "'w'" in message(error) and "63" in message(error)


@pytest.mark.parametrize("kept", [None, 8])
def test_external_data_of_a_loaded_model_missing_or_short(tmp_path: Path, kept: int | None) -> None:
    model = ir.load(save_external(tmp_path))
    data = tmp_path / "weights.bin"
    data.unlink() if kept is None else data.write_bytes(data.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"tensor '.*weights\.bin' cannot be read"):
        capture(model)


def test_external_length_shorter_than_shape(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    set_external(path, length="32")
    with pytest.raises(ModelError, match="needs 64"):
        capture(path)


@pytest.mark.parametrize("offset", ["-4", "ten", "1000000"])
def test_external_offset_outside_the_file(tmp_path: Path, offset: str) -> None:
    path = save_external(tmp_path)
    set_external(path, offset=offset)
    with pytest.raises(ModelError, match="'w'"):
        capture(path)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "inner/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", ""]
)
def test_external_data_outside_the_directory(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 1024)
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    path = save_external(folder)
    set_external(path, location=location)
    with pytest.raises(ModelError, match=r"outside the model's directory: .*; save the model again"):
        capture(path)


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 1024)
    folder = tmp_path / "model"
    folder.mkdir()
    path = save_external(folder)
    (folder / "weights.bin").unlink()
    os.symlink(tmp_path / "secret.bin", folder / "weights.bin")
    with pytest.raises(ModelError, match="outside the model's directory"):
        capture(path)


def test_external_data_behind_a_linked_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights.bin").write_bytes(b"\0" * 1024)
    folder = tmp_path / "model"
    folder.mkdir()
    path = save_external(folder)
    os.symlink(outside, folder / "sub")
    set_external(path, location="sub/weights.bin")
    with pytest.raises(ModelError, match="outside the model's directory"):
        capture(path)


def test_external_data_of_a_model_in_memory(tmp_path: Path) -> None:
    model = onnx.load(save_external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="no directory"):
        capture(model)


def test_external_data_in_an_attribute(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(4, np.float32), "c"))
    tensor = constant.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_model(None, constant, helper.make_node("Add", ["x", "c"], ["y"])).SerializeToString())
    with pytest.raises(ModelError, match="outside the model's directory"):
        capture(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[2, 1] = weight[3, 3] = bad
    with pytest.raises(ModelError) as error:
        capture(save_external(tmp_path, linear_model(weight)))
    assert "'w': 2 values are not finite, the first at [2, 1]" in message(error)


def test_nan_after_many_pieces() -> None:
    from qcompile.passes import validate

    weight = np.zeros(3 * validate._PIECE + 5, np.float16)
    weight[-1] = np.nan
    model = linear_model(None, helper.make_node("Identity", ["x"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(weight, "long"))
    with pytest.raises(ModelError, match=rf"'long': 1 value is not finite, the first at \[{weight.size - 1}\]"):
        capture(model)


def test_masks_of_zeros_and_infinities_are_no_error() -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    capture(linear_model(mask, helper.make_node("Add", ["x", "w"], ["y"])))


def test_a_mask_with_nan_is_an_error() -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    mask[3, 0] = np.nan
    with pytest.raises(ModelError, match=r"first at \[3, 0\] \(nan\)"):
        capture(linear_model(mask, helper.make_node("Add", ["x", "w"], ["y"])))


def test_unknown_operator() -> None:
    node = helper.make_node("Conjure", ["x"], ["y"], name="trick")
    node.metadata_props.add(key="namespace", value="encoder.layer.3")
    with pytest.raises(UnsupportedOperatorError) as error:
        capture(linear_model(None, node))
    assert "Conjure 'trick' in encoder.layer.3" in message(error) and "opset 18" in message(error)


@pytest.mark.parametrize("opset", [12, 25])
def test_an_opset_out_of_range_is_said_with_the_file(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(linear_model(opset=opset), path)
    with pytest.raises(ModelError, match=rf"net\.onnx: opset {opset} is"):
        capture(path)


def test_operator_of_a_later_opset() -> None:
    with pytest.raises(UnsupportedOperatorError, match="Gelu"):
        capture(linear_model(None, helper.make_node("Gelu", ["x"], ["y"]), opset=18))


@pytest.mark.parametrize("domain", ["com.microsoft", "my.domain"])
def test_operator_of_another_domain(domain: str) -> None:
    model = linear_model(None, helper.make_node("FastGelu", ["x"], ["y"], domain=domain, name="act"))
    model.opset_import.append(helper.make_opsetid(domain, 1))
    with pytest.raises(UnsupportedOperatorError, match=f"{domain}::FastGelu 'act'"):
        capture(model)


def test_operator_with_a_body_in_the_model_is_known() -> None:
    model = linear_model(None, helper.make_node("Twice", ["x"], ["y"], domain="my.domain"))
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    body = helper.make_function(
        "my.domain", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    model.functions.append(body)
    assert capture(model).output_names == ["y"]


def test_unknown_operator_inside_a_function() -> None:
    model = linear_model(None, helper.make_node("Twice", ["x"], ["y"], domain="my.domain"))
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    nodes = [helper.make_node("Conjure", ["a"], ["b"])]
    model.functions.append(
        helper.make_function("my.domain", "Twice", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)])
    )
    with pytest.raises(UnsupportedOperatorError, match=r"function Twice: .*Conjure"):
        capture(model)


def test_initializer_twice() -> None:
    model = linear_model()
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelError, match="'w' is defined twice"):
        capture(model)


def test_result_twice() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"], name="again")]
    with pytest.raises(ModelError, match=r"'y' is defined twice.*'again'"):
        capture(linear_model(None, *nodes))


def test_result_named_like_an_initializer() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["w"]), helper.make_node("Neg", ["w"], ["y"])]
    with pytest.raises(ModelError, match="'w' is defined twice"):
        capture(linear_model(None, *nodes))


def test_cycle() -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Neg", ["a"], ["y"]),
    ]
    with pytest.raises(ModelError, match="depends on its own result"):
        capture(linear_model(None, *nodes))


def test_missing_initializer() -> None:
    model = linear_model()
    del model.graph.initializer[:]
    with pytest.raises(ModelError, match="MatMul 'project' reads 'w', which nothing defines"):
        capture(model)


def test_output_without_producer() -> None:
    with pytest.raises(ModelError, match="graph output 'y'"):
        capture(linear_model(None, helper.make_node("Relu", ["x"], ["z"])))


@pytest.mark.parametrize("shape", [(5, 4), (4, 5, 4), (3,)])
def test_wrong_weight_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as error:
        capture(linear_model(np.zeros(shape, np.float32)))
    assert "MatMul 'project'" in message(error) and str(shape[0]) in message(error)


def test_wrong_element_type() -> None:
    with pytest.raises(ModelError, match="MatMul 'project'"):
        capture(linear_model(np.zeros((4, 4), np.int64)))


def test_missing_attribute() -> None:
    with pytest.raises(ModelError, match=r"Concat 'join'.*axis"):
        capture(linear_model(None, helper.make_node("Concat", ["x", "x"], ["y"], name="join")))


@pytest.mark.parametrize("opset", [9, 12])
def test_old_opset(opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset} is older than 13"):
        capture(linear_model(opset=opset))


def test_opset_of_the_future() -> None:
    with pytest.raises(QcompileError):
        capture(linear_model(opset=99))


def test_empty_graph() -> None:
    graph = helper.make_graph([], "empty", [], [])
    with pytest.raises(ModelError, match=r"no graph|empty"):
        capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def test_tensor_with_too_few_bytes() -> None:
    model = linear_model()
    model.graph.initializer[0].raw_data = b"abc"
    with pytest.raises(ModelError, match=r"'w' has 3 bytes.*needs 64"):
        capture(model)


def test_tensor_that_claims_to_be_huge() -> None:
    model = linear_model()
    model.graph.initializer[0].dims[0] = 1 << 50
    with pytest.raises(ModelError, match="'w'"):
        capture(model)


def test_negative_dimension() -> None:
    model = linear_model()
    model.graph.initializer[0].dims[0] = -4
    with pytest.raises(ModelError, match="negative dimension"):
        capture(model)


def test_unknown_element_type() -> None:
    model = linear_model()
    model.graph.initializer[0].data_type = 77
    with pytest.raises(ModelError, match="element type 77"):
        capture(model)


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nor exactly one ONNX file"):
        capture(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(linear_model().SerializeToString())
    with pytest.raises(ModelError, match=r"a\.onnx, b\.onnx"):
        capture(tmp_path)


def test_directory_with_one_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "only.onnx").write_bytes(linear_model().SerializeToString())
    assert capture(tmp_path).source["kind"] == "onnx"


def test_something_else() -> None:
    with pytest.raises(ModelError, match="cannot capture a dict"):
        capture({})
