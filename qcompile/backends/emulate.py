"""Run ARM programs on another machine: the artifact's own library, a small C++ host, TVM's ARM runtime, under qemu.

    program = EmulatedProgram("out")
    outputs = program(input_ids, attention_mask)

Everything computes exactly as on a board, only slowly. It needs qemu-aarch64 and an ARM cross compiler for C++, and the
runtime libraries from TVM's ARM wheels, which `fetch_runtime` downloads once (95 MB).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile import tensors
from qcompile.errors import InputError, TargetError
from qcompile.runtime import Checked, TensorSpec
from qcompile.targets import arm, folders, get_target

WHEELS = ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_24_aarch64")
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
HOST = Path(__file__).with_name("emulate_host.cc")


def cache() -> Path:
    """Where downloaded libraries and the compiled host are kept."""
    return folders.cache() / "aarch64-0.27.0.post1"


def fetch_runtime() -> Path:
    """Folder with TVM's runtime libraries for ARM, downloaded with pip if they are not there.

    Raises:
        TargetError: they cannot be downloaded.
    """
    folder = cache()
    if all((folder / name).is_file() for name in LIBRARIES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", work]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        done = subprocess.run(
            [*command, "--python-version", "3.11", "--implementation", "cp", *WHEELS],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise TargetError(f"TVM's ARM runtime cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if Path(name).name in LIBRARIES:
                        part = Path(work) / Path(name).name
                        part.write_bytes(archive.read(name))
                        part.replace(folder / part.name)
    return folder


@functools.cache
def host(target: Any) -> Path:
    """The C++ host, compiled for ``target`` unless it is in the cache.

    Raises:
        TargetError: there is no cross compiler for C++.
    """
    import tvm_ffi

    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        raise TargetError("emulating ARM programs needs a C++ cross compiler: `apt install g++-aarch64-linux-gnu`")
    folder = fetch_runtime()
    program = folder / f"host-{hashlib.sha256(HOST.read_bytes()).hexdigest()[:16]}"
    if not program.is_file():
        include = Path(tvm_ffi.__file__).parent / "include"
        part = program.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", f"-Wl,-rpath,{folder}"]
        command = [compiler, "-O1", "-std=c++17", "-I", include, HOST, "-o", part, *libraries]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"the emulation host does not compile:\n{done.stderr[-2000:]}")
        part.replace(program)
    return program


class EmulatedProgram(Checked):
    """An ARM artifact, run under qemu with one process per call.

    Args:
        folder: the artifact.

    Raises:
        TargetError: the emulator, the compiler or the runtime is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        content = json.loads((self.folder / "program.json").read_text(encoding="utf-8"))
        kind, cpu = content["target"]["kind"], content["target"]["cpu"]
        if kind != "arm":
            raise TargetError(
                f"the emulator runs programs for ARM, {self.folder} is for {kind}; run it without the emulator"
            )
        self._target = get_target("arm", variant=cpu)
        self._command = [*arm.emulator(self._target), str(host(self._target))]
        arrays = tensors.load(self.folder / "weights.safetensors")
        self._parameters = [arrays[name] for name in content["parameters"]]
        specs = {
            key: [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in content[key]]
            for key in ("inputs", "outputs")
        }
        super().__init__(specs["inputs"], specs["outputs"])

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name."""
        arrays = self.check(feeds)
        with tempfile.TemporaryDirectory(prefix="qcompile-emulate-") as work:
            arguments, results = Path(work) / "arguments", Path(work) / "results"
            write_tensors(arguments, [*arrays, *self._parameters])
            command = [*self._command, self.folder.absolute() / "lib" / "model.so", arguments, results]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            if done.returncode == 1:
                raise InputError(f"the program failed: {done.stderr.strip()}")
            if done.returncode:
                raise TargetError(f"the emulated program ended with {done.returncode}: {done.stderr[-1000:]}")
            return {spec.name: array for spec, array in zip(self.outputs, read_tensors(results), strict=True)}


_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


def write_tensors(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write tensors in the form ``emulate_host.cc`` reads."""
    with open(path, "wb") as file:
        file.write(np.uint64(len(arrays)).tobytes())
        for array in arrays:
            head = [_CODES[array.dtype.kind], 8 * array.dtype.itemsize, array.ndim, *array.shape]
            file.write(np.array(head, np.uint64).tobytes())
            file.write(np.ascontiguousarray(array).tobytes())


def read_tensors(path: Path) -> list[np.ndarray]:
    """Read tensors as `write_tensors` writes them."""
    data, found = path.read_bytes(), []
    kinds = {code: kind for kind, code in _CODES.items()}
    (count,) = np.frombuffer(data, np.uint64, 1)
    at = 8
    for _ in range(int(count)):
        code, bits, rank = (int(v) for v in np.frombuffer(data, np.uint64, 3, at))
        shape = [int(v) for v in np.frombuffer(data, np.uint64, rank, at + 24)]
        dtype = np.dtype(bool) if kinds[code] == "b" else np.dtype(f"{kinds[code]}{bits // 8}")
        at += 24 + 8 * rank
        size = int(np.prod(shape, dtype=np.int64))
        found.append(np.frombuffer(data, dtype, size, at).reshape(shape).copy())
        at += size * dtype.itemsize
    return found


if __name__ == "__main__":
    try:
        print(fetch_runtime())
    except TargetError as error:
        sys.exit(str(error))
