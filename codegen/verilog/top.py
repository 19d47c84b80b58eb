"""The Verilog of a netlist: the top module, the units it needs from ``rtl/``, and the files their memories read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qcompile.codegen.verilog.netlist import Channel, Netlist, Unit

HERE = Path(__file__).parent
RTL = HERE / "rtl"


@cache
def environment() -> jinja2.Environment:
    """The templates of this folder."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def padded(channel: Channel) -> int:
    """Width of the AXI4-Stream data of a channel: whole bytes."""
    return -(-channel.width // 8) * 8


def render(template: str, **values: Any) -> str:
    """Fill in a template."""
    return environment().get_template(template).render(padded=padded, **values)


def top_module(netlist: Netlist) -> str:
    """The top module, named after the netlist."""
    channels = {c.name: c for c in netlist.inputs}
    units = []
    for unit in netlist.units:
        channels |= {c.name: c for c in [*unit.inputs.values(), *unit.outputs.values()]}
        units.append({**vars(unit), "ports": {**unit.inputs, **unit.outputs}})
    return render(
        "top.v.j2",
        top=netlist.name,
        inputs=netlist.inputs,
        outputs=netlist.outputs,
        channels=list(channels.values()),
        units=units,
        depth_parameter=depth_parameter,
    )


def depth_parameter(unit: Unit | dict[str, Any], prefix: str) -> str:
    """Name of the parameter for the FIFO behind an output."""
    outputs = unit["outputs"] if isinstance(unit, dict) else unit.outputs
    return "DEPTH" if len(outputs) == 1 else f"{prefix.upper()}_DEPTH"


def library(netlist: Netlist) -> dict[str, str]:
    """The files of ``rtl/`` that the netlist needs, and the modules written for it, by name."""
    sources = {p.stem: p.read_text(encoding="utf-8") for p in sorted(RTL.glob("*.v"))}
    sources |= {u.module: text for u in netlist.units if (text := u.source) is not None}
    wanted = {u.module for u in netlist.units}
    found: set[str] = set()
    while wanted - found:
        name = (wanted - found).pop()
        found.add(name)
        wanted |= {m for m in re.findall(r"^\s*(\w+) #\(", sources[name], re.MULTILINE) if m in sources}
    return {f"{name}.v": sources[name] for name in sorted(found)}


def write(netlist: Netlist, folder: Path) -> list[str]:
    """Write everything a tool needs into ``folder``; returns the names of the Verilog files, the top module last."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {**library(netlist), f"{netlist.name}.v": top_module(netlist)}
    for unit in netlist.units:
        for memory in unit.memories.values():
            (folder / memory.file).write_text(memory.hex(), encoding="ascii")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return list(files)
