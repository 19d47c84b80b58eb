"""ARM programs run on an ARM machine, or elsewhere under qemu with a cross compiler; without those, tests skip."""

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
