"""The FPGA example: networks trained on digits, whose hardware gives the integers of its model.onnx and keeps their accuracy."""

import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "fpga_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fpga_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("name", "simulator", "products"),
    [
        ("mlp", "verilator", "lut"),
        ("cnn", "c", "lut"),
        ("vit", "c", "lut"),
        ("mixer", "c", "lut"),
        ("jet", "c", "constant"),
    ],
)
def test_hardware_keeps_the_accuracy_on_the_whole_test_set(example, name, simulator, products, tmp_path):
    if simulator == "verilator" and shutil.which("verilator") is None:
        pytest.skip("needs verilator")
    found = example.main(name, simulator, str(tmp_path / "out"), epochs=25, products=products)
    assert found["differences"] == 0
    assert found["float"] > 80
    assert found["hardware"] >= found["float"] - 1.5
