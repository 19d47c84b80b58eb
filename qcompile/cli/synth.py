"""``qcompile synth``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click


@click.command()
@click.argument("artifact")
@click.option("--device", help="Another device than the one it was compiled for; see `qcompile targets`.")
@click.option("--place/--no-place", default=False, help="Also place and route (ECP5), for the clock.")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of place and route; the median counts."
)
@click.option("--nodes", is_flag=True, help="Also every node on its own.")
@click.option("--options", default="", help="More options of the synthesis command, e.g. -nodsp.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def synth(artifact: str, device: str | None, place: bool, seeds: int, nodes: bool, options: str, as_json: bool) -> None:
    """Synthesise the hardware in ARTIFACT with Yosys, and print its area beside the estimate."""
    from statistics import median

    from qcompile.artifact import open_artifact
    from qcompile.codegen.verilog import synthesize
    from qcompile.codegen.verilog.artifact import copy_sources, measured
    from qcompile.errors import TargetError
    from qcompile.targets import get_target
    from qcompile.targets.fpga import FpgaTarget

    found = open_artifact(artifact)
    if found.manifest["target"]["kind"] != "fpga":
        raise TargetError(f"{artifact} holds no hardware; it was compiled for {found.manifest['target']['kind']}")
    target = get_target("fpga", variant=device or found.manifest["target"]["cpu"])
    assert isinstance(target, FpgaTarget)
    content = json.loads(found.file("program.json").read_text(encoding="utf-8"))
    hardware = json.loads(found.file("hardware.json").read_text(encoding="utf-8"))
    estimate = hardware["estimate"]
    with tempfile.TemporaryDirectory(prefix="qcompile-synth-") as temporary:
        folder = Path(temporary)
        sources = copy_sources(Path(artifact) / "verilog", folder)
        by_node = {}
        if nodes:  # first: place and route reads what the last run left
            units = synthesize.by_unit(folder, content["name"], sources, target, options=options)
            by_node = {
                n["name"]: {
                    "kind": n["kind"],
                    "estimated_luts": n["estimate"]["luts"],
                    **measured([units.get(f"u_{u}", synthesize.NOTHING) for u in n["units"]]),
                }
                for n in hardware["nodes"]
            }
        result = synthesize.synthesize(folder, content["name"], sources, target, options=options)
        summary = {
            "device": target.cpu,
            "luts": result.luts,
            "carries": result.carries,
            "flipflops": result.flipflops,
            "multipliers": result.multipliers,
            "memories": result.memories,
            "estimated_luts": estimate["luts"],
            "cells": dict(result.cells),
        }
        if nodes:
            summary["nodes"] = by_node
        if place:
            clocks = [synthesize.place(folder, content["name"], target, seed=s + 1).megahertz for s in range(seeds)]
            summary["megahertz"] = median(clocks)
    if as_json:
        click.echo(json.dumps(summary))
        return
    for name in ("luts", "carries", "flipflops", "multipliers", "memories"):
        share = f" ({summary[name] / getattr(target, name):.1%})" if getattr(target, name, 0) else ""
        click.echo(f"{name:12} {summary[name]}{share}")
    click.echo(f"{'estimate':12} {estimate['luts']} luts")
    for name, node in summary.get("nodes", {}).items():
        click.echo(
            f"  {name:24} {node['kind']:10} {node['luts']:6} luts ({node['estimated_luts']} estimated), "
            f"{node['flipflops']} flipflops, {node['multipliers']} multipliers, {node['memories']} memories"
        )
    if place:
        click.echo(f"{'clock':12} {summary['megahertz']:.1f} MHz after routing")
