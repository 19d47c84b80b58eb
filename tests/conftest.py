"""What holds for all tests."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_measurements_of_the_user(tmp_path_factory):
    """Kernels are chosen as on a machine where nothing was tuned."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))
    os.environ.pop("QCOMPILE_TUNED", None)
