"""Aligned safetensors files: what is written is what is read, by us and by the library."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile import tensors
from qcompile.errors import ArtifactError


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        hnp.arrays(
            st.sampled_from([np.int8, np.uint8, np.float16, np.float32, np.int64, np.bool_]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_round_trip_aligned_and_readable_by_the_library(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("t") / "w.safetensors"
    named = {f"t{i}": a for i, a in enumerate(arrays)}
    places = tensors.save(path, named)
    mine, theirs = tensors.load(path), safetensors.numpy.load_file(path)
    assert list(mine) == list(named)
    for name, array in named.items():
        assert places[name].offset % tensors.ALIGNMENT == 0
        for found in (mine[name], theirs[name]):
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)
        if array.size:
            assert mine[name].ctypes.data % tensors.ALIGNMENT == 0


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors.save(path, {"a": np.arange(100, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="'a'"):
        tensors.load(path)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 64, b"\x10" + b"\0" * 7 + b"not json at all!"])
def test_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        tensors.load(path)


def test_a_tensor_pointing_outside_the_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(ArtifactError, match="outside"):
        tensors.load(path)
