"""Simulation of a netlist, or of an artifact's Verilog, with Verilator or with CXXRTL of Yosys.

Both compile the design to C++ and link it with ``templates/harness.cpp.j2``, which moves beats between files and ports,
with or without stalls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from qcompile.codegen.verilog import tools
from qcompile.codegen.verilog.netlist import Channel, pack_beats, unpack_beats
from qcompile.codegen.verilog.top import padded, render
from qcompile.errors import TargetError

PATIENCE = 20_000
"""Cycles without a beat after which a simulation ends."""


@dataclass(frozen=True)
class Traffic:
    """What moved through a port: beats, and the cycles of the first and the last one."""

    beats: int
    first: int
    last: int


@dataclass(frozen=True)
class Simulator:
    """A compiled simulation.

    Attributes:
        binary: the executable.
        inputs, outputs: its ports.
    """

    binary: Path
    inputs: Sequence[Channel]
    outputs: Sequence[Channel]

    def run(
        self, values: Mapping[str, np.ndarray], stalls: int = 0, seed: int = 1
    ) -> tuple[dict[str, np.ndarray], dict[str, Traffic]]:
        """Feed whole frames and return what comes out, flat int64, and the traffic of every port.

        Args:
            values: integers by input port, any shape, in stream order.
            stalls: 0 for none, 1 for random stalls of every beat, 2 for long pauses.
            seed: of the stalls.

        Raises:
            TargetError: the simulation broke off.
        """
        folder = self.binary.parent / f"run-{os.getpid()}-{stalls}-{seed}"
        folder.mkdir(exist_ok=True)
        for channel in self.inputs:
            pack_beats(values[channel.name], channel).tofile(folder / f"{channel.name}.in")
        done = subprocess.run(
            [self.binary, folder, str(stalls), str(seed)],
            cwd=self.binary.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or "overflow" in done.stdout:
            raise TargetError(f"the simulation broke off: {done.stdout[-500:]} {done.stderr[-500:]}")
        traffic = {}
        for line in done.stdout.splitlines():
            name, *numbers = line.split()
            traffic[name] = Traffic(*map(int, numbers))
        results = {}
        for channel in self.outputs:
            raw = np.fromfile(folder / f"{channel.name}.out", np.uint8).reshape(-1, padded(channel) // 8)
            results[channel.name] = unpack_beats(raw, channel)
        return results, traffic


def build(
    folder: Path,
    top: str,
    sources: Sequence[str],
    inputs: Sequence[Channel],
    outputs: Sequence[Channel],
    simulator: str = "verilator",
) -> Simulator:
    """Compile a simulation of the Verilog in ``folder``, there.

    Args:
        folder: holds ``sources`` and the files of their memories; receives ``harness-SIMULATOR``.
        top: the top module.
        sources: names of the Verilog files.
        inputs, outputs: its ports.
        simulator: ``verilator`` or ``cxxrtl``.

    Raises:
        TargetError: the simulator is not installed or rejects the design.
    """
    if simulator not in BUILDERS:
        raise TargetError(f"unknown simulator {simulator!r}; known: {', '.join(BUILDERS)}")
    escaped = top.replace("_", "__")

    def port(name: str) -> str:
        return name if simulator == "verilator" else "p_" + name.replace("_", "__")

    def set_bit_on(design: str, name: str, value: str) -> str:
        return f"{design}.{port(name)}{'' if simulator == 'verilator' else '.data[0]'} = {value};"

    def get_bit(name: str) -> str:
        if simulator == "verilator":
            return f"d.{name}"
        return f"bit(d.{port(name)})"

    text = render(
        "harness.cpp.j2",
        simulator=simulator,
        top=top,
        top_escaped=escaped,
        inputs=inputs,
        outputs=outputs,
        port=port,
        set_bit=lambda name, value: set_bit_on("d", name, value),
        set_bit_on=set_bit_on,
        get_bit=get_bit,
        patience=PATIENCE,
    )
    (folder / f"harness-{simulator}.cpp").write_text(text, encoding="utf-8")
    binary = BUILDERS[simulator](folder, top, sources)
    return Simulator(binary, inputs, outputs)


@cache
def _objects() -> tempfile.TemporaryDirectory[str]:
    """Where the objects of Verilator's run-time wait for the next design; they are the same for all, and take longest."""
    return tempfile.TemporaryDirectory(prefix="qcompile-verilator-")


def _verilator(folder: Path, top: str, sources: Sequence[str]) -> Path:
    command = [
        *tools.require("verilator"), "--cc", "--exe", "-O3", "-Wno-fatal", "-Wno-WIDTH", "-Wno-lint",
        "--x-assign", "fast", "--top-module", top, "--Mdir", "verilated", "-CFLAGS", "-w", "-o", "harness",
        *sources, "harness-verilator.cpp",
    ]  # fmt: skip
    tools.call(command, folder)
    made, kept = folder / "verilated", Path(_objects().name)
    for file in kept.iterdir():
        shutil.copy(file, made / file.name)
    levels = ("OPT_FAST=-O1", "OPT_SLOW=-O0", "OPT_GLOBAL=-O1")
    tools.call([*tools.require("make"), "-j", "2", "-f", f"V{top}.mk", *levels, "harness"], made)
    for file in made.glob("verilated*.[od]"):
        if not (kept / file.name).exists():
            shutil.copy(file, kept / file.name)
    binary = folder / "harness-verilator"
    binary.unlink(missing_ok=True)
    (made / "harness").rename(binary)
    return binary


def _cxxrtl(folder: Path, top: str, sources: Sequence[str]) -> Path:
    script = (
        f"read_verilog -defer {' '.join(sources)}; hierarchy -check -top {top}; write_cxxrtl -O6 -nohierarchy design.h"
    )
    yosys, headers = tools.cxxrtl()
    tools.call([*yosys, "-q", "-p", script], folder)
    compiler = tools.require("c++")
    binary = folder / "harness-cxxrtl"
    tools.call(
        [*compiler, "-std=c++17", "-O1", "-w", *(f"-I{h}" for h in headers), "harness-cxxrtl.cpp", "-o", binary.name],
        folder,
    )
    return binary


BUILDERS = {"verilator": _verilator, "cxxrtl": _cxxrtl}
