"""Synthesis of Verilog with Yosys, and place and route for ECP5 with nextpnr: cells by kind, and the clock."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from qcompile.codegen.verilog import tools
from qcompile.codegen.verilog.top import RTL
from qcompile.errors import TargetError
from qcompile.targets.fpga import FpgaTarget


@dataclass(frozen=True)
class Synthesis:
    """What synthesis found.

    Attributes:
        cells: count by the device's cell names.
        luts: look-up tables; those that serve as memory count too, and the two of every carry cell of ECP5.
        carries, flipflops, multipliers, memories: carry cells, registers, DSP and block memory cells.
    """

    cells: Mapping[str, int]
    luts: int
    carries: int
    flipflops: int
    multipliers: int
    memories: int


NOTHING = Synthesis({}, 0, 0, 0, 0, 0)
"""What an instance takes that `by_unit` does not list: only wires are left of it."""

_MEMORY_LUTS = {"RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "SRL16E": 1, "SRLC32E": 1,
                "SRLC16E": 1, "RAM64X1S": 1, "RAM32X1S": 1, "RAM256X1S": 4, "RAM128X1S": 2, "RAM16X1D": 2,
                "TRELLIS_DPR16X4": 4}  # fmt: skip


def synthesize(
    folder: Path,
    top: str,
    sources: Sequence[str],
    target: FpgaTarget,
    *,
    options: str = "",
    parameters: Mapping[str, int] | None = None,
    timeout: float | None = None,
) -> Synthesis:
    """Synthesise ``top`` for a device; leaves ``TOP.json`` in ``folder`` for place and route.

    Args:
        folder: holds the sources and the contents of their memories.
        top, sources: the top module and the files; where ``rtl/`` has one for the blocks of the family, that one is taken.
        target: the device.
        options: more options of the synthesis command, e.g. ``-nodsp``.
        parameters: of the top module, where its own defaults are not meant.
        timeout: seconds after which to give up.

    Raises:
        TargetError: Yosys is missing or rejects the design.
    """
    _run(folder, top, sources, target, f"{target.synthesis} {options}", parameters, timeout)
    return read_cells((folder / f"{top}.stat").read_text(encoding="utf-8"))


def by_unit(
    folder: Path,
    top: str,
    sources: Sequence[str],
    target: FpgaTarget,
    *,
    options: str = "",
    timeout: float | None = None,
) -> dict[str, Synthesis]:
    """What each instance in ``top`` takes, by its name, when units are not mixed with each other; as `synthesize`."""
    _run(folder, top, sources, target, f"{target.hierarchical} {options}", None, timeout)
    modules = json.loads((folder / f"{top}.json").read_text(encoding="utf-8"))["modules"]

    def is_unit(kind: str) -> bool:  # cells of the device are modules without cells
        return kind in modules and bool(modules[kind]["cells"])

    @cache
    def count(module: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for cell in modules[module]["cells"].values():
            total += count(cell["type"]) if is_unit(cell["type"]) else Counter([cell["type"]])
        return total

    return {name: _summary(count(c["type"])) for name, c in modules[top]["cells"].items() if is_unit(c["type"])}


def _run(
    folder: Path,
    top: str,
    sources: Sequence[str],
    target: FpgaTarget,
    command: str,
    parameters: Mapping[str, int] | None,
    timeout: float | None,
) -> None:
    """Leaves ``TOP.json`` and ``TOP.stat`` in ``folder``."""
    files = [f'"{p if (p := RTL / target.family / Path(f).name).is_file() else f}"' for f in sources]
    chosen = " ".join(f"-chparam {name} {value}" for name, value in (parameters or {}).items())
    script = f"read_verilog -defer {' '.join(files)}; hierarchy -top {top} {chosen}; {command} -top {top}; write_json {top}.json; tee -o {top}.stat stat"
    tools.call([*tools.require("yosys"), "-q", "-p", script], folder, timeout)


def read_cells(text: str) -> Synthesis:
    """Read the output of Yosys's ``stat`` (the last module is the whole)."""
    blocks = re.split(r"^=== .* ===$", text, flags=re.MULTILINE)
    cells: dict[str, int] = {}
    for line in blocks[-1].splitlines():
        if match := re.match(r"^\s+(?:(\d+)\s+)?([A-Z\$][\w\$]*)(?:\s+(\d+))?\s*$", line):
            number = match[1] or match[3]
            if number is not None and match[2] not in ("Number",):
                cells[match[2]] = int(number)
    return _summary(cells)


def _summary(cells: Mapping[str, int]) -> Synthesis:
    luts = sum(n for name, n in cells.items() if re.fullmatch(r"LUT[1-6](_2)?", name))
    luts += sum(n * _MEMORY_LUTS[name] for name, n in cells.items() if name in _MEMORY_LUTS)
    luts += 2 * cells.get("CCU2C", 0)
    return Synthesis(
        cells,
        luts,
        carries=cells.get("CARRY4", 0) + cells.get("CCU2C", 0),
        flipflops=sum(n for name, n in cells.items() if name.startswith("FD") or name == "TRELLIS_FF"),
        multipliers=sum(n for name, n in cells.items() if name.startswith(("DSP48", "MULT18"))),
        memories=sum(n for name, n in cells.items() if name.startswith(("RAMB", "DP16KD", "PDPW16KD"))),
    )


@dataclass(frozen=True)
class Placement:
    """What place and route found.

    Attributes:
        megahertz: highest clock after routing, of the slowest clock.
        utilisation: used and available cells by kind.
    """

    megahertz: float
    utilisation: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def place(
    folder: Path,
    top: str,
    target: FpgaTarget,
    *,
    seed: int = 1,
    speed: int = 6,
    megahertz: float = 200,
    timeout: float | None = None,
) -> Placement:
    """Place and route ``TOP.json`` for an ECP5 out of context (without pins).

    Raises:
        TargetError: no tool for the device, or the design does not fit.
    """
    if not target.place:
        raise TargetError(f"no open tool places and routes {target.cpu}; only its synthesis is available")
    report = folder / f"{top}.place.json"
    command = [
        *tools.require("nextpnr-ecp5"), target.place, "--package", "CABGA381" if "12k" not in target.place else "CABGA256",
        "--speed", str(speed), "--json", f"{top}.json", "--out-of-context", "--seed", str(seed), "--freq", str(megahertz),
        "--timing-allow-fail", "--report", report.name, "-q",
    ]  # fmt: skip
    tools.call(command, folder, timeout)
    content = json.loads(report.read_text(encoding="utf-8"))
    clocks = [entry["achieved"] for entry in content["fmax"].values()]
    if not clocks:
        raise TargetError(f"nextpnr found no clock in {top}")
    return Placement(min(clocks), content.get("utilization", {}))
