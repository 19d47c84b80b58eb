"""Aligned safetensors files, memory-mapped.

The safetensors format (https://github.com/huggingface/safetensors) allows no holes, so alignment is bought with
explicit padding tensors: every tensor starts at a multiple of 64 bytes of the file, as vector loads want it. Any
safetensors reader reads the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qcompile.errors import ArtifactError

ALIGNMENT = 64
_PAD = "__pad__."
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in its file."""

    offset: int
    length: int


def save(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> dict[str, Placement]:
    """Write ``arrays`` in order and return where each one lies.

    Raises:
        ArtifactError: a dtype that safetensors does not know, or the disk is full.
    """
    header: dict[str, object] = {}
    position = 0
    places: list[tuple[str, int, np.ndarray]] = []
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise ArtifactError(f"tensor {name!r}: dtype {array.dtype} cannot be stored")
        if gap := -position % ALIGNMENT:
            header[f"{_PAD}{len(header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
            position += gap
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        places.append((name, position, array))
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, offset, array in places:
                file.write(b"\0" * (start + offset - file.tell()))
                file.write(np.ascontiguousarray(array).data)
    except OSError as error:
        raise ArtifactError(f"cannot write {os.fspath(path)}: {error.strerror}") from None
    return {name: Placement(start + offset, array.nbytes) for name, offset, array in places}


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Memory-map a safetensors file; pages are read on first use and never written back.

    Raises:
        ArtifactError: the file is truncated or its header is not valid.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ArtifactError(f"{file} is truncated or not a safetensors file")
            header = json.loads(handle.read(length))
        raw = np.memmap(file, np.uint8, "c")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not a readable safetensors file: {error}") from None
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__" or name.startswith(_PAD):
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = (8 + length + int(o) for o in entry["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise ValueError("lies outside the file")
            arrays[name] = raw[begin:end].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{file}: tensor {name!r} is not readable: {error}") from None
    return arrays
