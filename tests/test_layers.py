"""Imports go one way: targets <- codegen <- qcompile, passes <- qcompile; formats and errors may be used by all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FREE = ("qcompile.errors",)
ALLOWED = {
    "targets": ("qcompile.targets", *FREE),
    "codegen": ("qcompile.codegen", "qcompile.targets", "qcompile.formats", *FREE),
    "passes": ("qcompile.passes", "qcompile.formats", *FREE),
    "qcompile/formats": ("qcompile.formats", *FREE),
    "qcompile/solvers": ("qcompile.solvers", "qcompile.formats", *FREE),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_lies_below_it(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            if name == "qcompile" or name.startswith("qcompile."):
                below = any(name == a or name.startswith(a + ".") for a in ALLOWED[folder])
                assert below, f"{path.relative_to(ROOT)} imports {name}"


def test_errors_import_nothing():
    assert set(imports(ROOT / "qcompile" / "errors.py")) <= {"__future__"}


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import sys, qcompile, qcompile.compiled; print([m for m in ('tvm', 'torch', 'onnx', 'onnxruntime', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
