"""A convolutional network for ARM under qemu: the C library and the program, bit for bit those of x86 with AVX2."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from c_library import CLibrary
from torch import nn

import qcompile
from qcompile.backends import Job, get_backend
from qcompile.compiled import load_program
from qcompile.errors import TargetError
from qcompile.report import Report
from qcompile.targets import get_target, x86

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from vision import InvertedResidual, Residual, _settled

pytestmark = pytest.mark.skipif(not x86.host_features() >= x86.AVX2.features, reason="needs AVX2 to compare with")


class Network(nn.Module):
    """Residual blocks of ResNet and MobileNet: strides, depthwise and pointwise convolutions, 3 and 20 channels."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(3, 20, 2), InvertedResidual(20, 20, 1, 2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(20, 7)

    def forward(self, image):
        return self.head(self.blocks(image).flatten(1))


def network():
    return _settled(Network(), 18)


@pytest.fixture(scope="module", params=["w8a8-rtn", "w8a8-static"])
def compiled(request, tmp_path_factory, emulation):
    """The artifact for ARM, and the same quantized model compiled for x86."""
    folder = tmp_path_factory.mktemp("cnn")
    samples = [{"image": np.random.default_rng(0).normal(size=(2, 3, 18, 18)).astype(np.float32)}]
    artifact = qcompile.compile(
        f"{__file__}:network",
        target="arm",
        recipe=request.param,
        calibration=samples,
        emit=["c"],
        options={"name": "net"},
        output=folder / "arm",
        keep_stages=folder / "stages",
        progress=False,
    )
    quantized = ir.load(next((folder / "stages").glob("*quantized.onnx")))
    (folder / "x86").mkdir()
    target = get_target("x86-64-v3", cores=1)
    get_backend("x86").emit(Job(folder / "x86", quantized, target, Report("net", str(target), request.param)))
    return artifact, load_program(folder / "x86")


def image(batch):
    return np.random.default_rng(batch).normal(size=(batch, 3, 18, 18)).astype(np.float32)


def test_convolutions_run_on_kernels_and_the_c_library_equals_x86(compiled, tmp_path):
    artifact, reference = compiled
    assert artifact.report.kernels["depthwise convolution"] == 1
    assert artifact.report.kernels["convolution as a matrix product"] == 5
    assert artifact.report.kernels["arm-sdot"] == 6
    library = CLibrary(artifact.path, "net", tmp_path, get_target("arm"))
    for batch in (1, 3):
        np.testing.assert_array_equal(library.run(image(batch))[0], reference(image(batch)))


def test_the_program_equals_x86(compiled):
    from qcompile.backends.emulate import LIBRARIES, EmulatedProgram, cache

    if not all((cache() / name).is_file() for name in LIBRARIES):
        pytest.skip("TVM's ARM runtime was not downloaded; `make tools` does it")
    artifact, reference = compiled
    try:
        program = EmulatedProgram(artifact.path)
    except TargetError as reason:
        pytest.skip(str(reason))
    np.testing.assert_array_equal(program(image(2)), reference(image(2)))
