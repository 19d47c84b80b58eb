"""ARM programs run on an ARM machine, or elsewhere under qemu with a cross compiler; without those, tests skip."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.errors import TargetError
from qcompile.targets import arm, get_target

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def emulation():
    """Skips where ARM programs cannot be linked or run."""
    target = get_target("arm")
    try:
        arm.static_compiler(target)
        arm.emulator(target)
    except TargetError as reason:
        pytest.skip(f"ARM programs cannot run here: {reason}")


@pytest.fixture(scope="session")
def counting(emulation):
    """Skips where instructions cannot be counted, so that a count that fails is a failure."""
    emulator = arm.emulator(get_target("arm"))
    if not emulator:
        pytest.skip("instructions are counted under qemu, not on an ARM machine")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("counting instructions needs a C compiler for this machine")
    options = subprocess.run([emulator[0], "-h"], capture_output=True, text=True, check=False).stdout
    if "-plugin" not in options:
        pytest.skip(f"{emulator[0]} was built without plugins")
