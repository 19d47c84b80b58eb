"""The loaded program: inputs are checked by name, odd memory is handled, the compiler library stays out."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompile
from qcompile import ort
from qcompile.errors import ArtifactError, InputError, TargetError

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[batch, 24] x, float[batch, 24] r, int64[batch] ids, float[24, 40] w, float[40] b, float[70, 40] table) => (float[batch, 40] y, float[batch, 40] z)
{
    s = Add (x, r)
    p = MatMul (s, w)
    h = Add (p, b)
    y = Gelu (h)
    e = Gather (table, ids)
    z = Add (y, e)
}
"""


@pytest.fixture(scope="module")
def model():
    built = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    random = np.random.default_rng(0)
    for value in [v for v in built.graph.inputs if v.name in ("w", "b", "table")]:
        value.const_value = ir.tensor(
            random.standard_normal([int(d) for d in value.shape]).astype(np.float32), name=value.name
        )
        built.graph.inputs.remove(value)
        built.graph.register_initializer(value)
    return built


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    return qcompile.compile(model, recipe="w8a8-rtn", output=tmp_path_factory.mktemp("c") / "a", progress=False)


def feed(batch=3):
    random = np.random.default_rng(batch)
    x, r = (random.standard_normal((batch, 24)).astype(np.float32) for _ in "xr")
    return {"x": x, "r": r, "ids": random.integers(0, 70, batch)}


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_program_and_onnx_agree_at_any_batch(model, compiled, batch):
    got, emitted = compiled.run(feed(batch)), ort.run(ort.session(compiled.onnx_path, settings={}), feed(batch))
    exact = ort.run(model, feed(batch))
    for name in ("y", "z"):
        np.testing.assert_allclose(got[name], emitted[name], rtol=1e-3, atol=0.02)
        assert np.linalg.norm(got[name] - exact[name]) < 0.02 * np.linalg.norm(exact[name])


def test_by_position_by_name_and_as_a_mapping(compiled):
    f = feed()
    by_name = compiled(**f)
    for other in (compiled(*f.values()), compiled(f), compiled(f["x"], ids=f["ids"], r=f["r"])):
        for a, b in zip(by_name, other):
            np.testing.assert_array_equal(a, b)


def test_torch_tensors_in_and_out(compiled):
    torch = pytest.importorskip("torch")
    f = feed()
    y, _ = compiled(**{k: torch.from_numpy(v) for k, v in f.items()})
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), compiled(**f)[0])


def test_memory_of_any_layout(compiled):
    f = feed(4)
    want = compiled(**f)[0]
    buffer = np.zeros(4 * 24 * 4 + 4, np.uint8)
    unaligned = buffer[4:].view(np.float32).reshape(4, 24)
    unaligned[...] = f["x"]
    strided = np.zeros((4, 48), np.float32)[:, ::2]
    strided[...] = f["x"]
    fortran = np.asfortranarray(f["x"])
    readonly = f["x"].copy()
    readonly.flags.writeable = False
    for x in (unaligned, strided, fortran, readonly):
        np.testing.assert_array_equal(compiled(**{**f, "x": x})[0], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "'x' is missing"),
        ({"extra": np.zeros(1)}, "no input 'extra'"),
        ({"x": np.zeros((3, 24))}, "float64"),
        ({"x": np.zeros((3, 25), np.float32)}, "25 along axis 1"),
        ({"x": np.zeros(24, np.float32)}, "shape"),
        ({"r": np.zeros((4, 24), np.float32)}, "batch is 3 in 'x' but 4 in 'r'"),
        ({"ids": np.zeros(3, np.int32)}, "int32"),
        ({"x": "text"}, "'x'"),
    ],
)
def test_wrong_inputs_are_named(compiled, change, message):
    f = {k: v for k, v in {**feed(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        compiled.run(f)


def test_threads_do_not_change_results(compiled):
    from qcompile.runtime import set_threads

    results = []
    for count in (1, 2):
        set_threads(count)
        results.append(compiled(**feed(40))[0])
    np.testing.assert_array_equal(*results)
    with pytest.raises(InputError, match="positive"):
        set_threads(0)


def test_saved_copy_runs_without_the_compiler_library(compiled, tmp_path):
    compiled.save(tmp_path / "copy")
    np.savez(tmp_path / "in.npz", **feed())
    code = (
        "import sys, numpy as np, qcompile; m = qcompile.load(sys.argv[1]);"
        "y, z = m(**dict(np.load(sys.argv[2]))); np.save(sys.argv[3], y);"
        "assert 'libtvm_compiler' not in open('/proc/self/maps').read();"
        "found = {n.split('.')[0] for n in sys.modules if n[0] != '_'} - set(sys.stdlib_module_names);"
        "assert found <= {'numpy', 'qcompile', 'tvm', 'tvm_ffi', 'ml_dtypes', 'typing_extensions', 'cython_runtime'}, found"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "in.npz"), str(tmp_path / "y.npy")]
    subprocess.run(command, check=True, cwd="/")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), compiled(**feed())[0])
    with pytest.raises(ArtifactError, match="exists"):
        compiled.save(tmp_path / "copy")


def test_a_program_for_another_machine_is_refused(compiled, tmp_path, monkeypatch):
    from qcompile import compiled as module
    from qcompile.targets import x86

    monkeypatch.setattr(x86, "host_features", lambda: frozenset({"fma"}))
    with pytest.raises(TargetError, match="avx2"):
        module.load(compiled.path)(**feed())


def test_another_program_at_the_same_place_is_loaded(model, tmp_path):
    """While the first is still in use."""
    other = model.clone()
    other.graph[1].replace_input_with(0, other.graph.inputs[1])  # the product of r alone
    first = qcompile.compile(model, recipe="float", output=tmp_path / "a", progress=False)
    y = first.run(feed())["y"]
    second = qcompile.compile(other, recipe="float", output=tmp_path / "a", overwrite=True, progress=False)
    np.testing.assert_allclose(second.run(feed())["y"], ort.run(other, feed())["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first.run(feed())["y"], y)


def test_equal_compiles_give_equal_files(model, compiled, tmp_path):
    """Whatever addresses objects get: the second compile runs in another process, with memory laid out differently."""
    ir.save(model, tmp_path / "net.onnx")
    code = (
        "import sys, onnx_ir as ir, qcompile; filler = [bytearray(n) for n in range(16, 5000, 3)];"
        "qcompile.compile(ir.load(sys.argv[1]), recipe='w8a8-rtn', output=sys.argv[2], progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.onnx"), str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=tmp_path)
    names = [p.relative_to(compiled.path).as_posix() for p in compiled.path.rglob("*") if p.is_file()]
    assert "lib/model.so" in names and "manifest.json" in names
    differing = [n for n in names if (compiled.path / n).read_bytes() != (tmp_path / "again" / n).read_bytes()]
    assert not differing
