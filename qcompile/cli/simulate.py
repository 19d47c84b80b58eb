"""``qcompile simulate``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("artifact")
@click.argument("inputs")
@click.option(
    "--with",
    "simulator",
    type=click.Choice(["verilator", "cxxrtl", "c"]),
    default="verilator",
    show_default=True,
    help="What runs the hardware; c runs the C99 program.",
)
@click.option("--stalls", type=click.IntRange(0, 2), default=0, help="1: beats wait at random; 2: long pauses.")
@click.option("--seed", default=1, show_default=True, help="Of the stalls.")
@click.option("-o", "--output", type=click.Path(), help="Write the outputs to this .npz file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate(
    artifact: str, inputs: str, simulator: str, stalls: int, seed: int, output: str | None, as_json: bool
) -> None:
    """Simulate the hardware in ARTIFACT on INPUTS, a .npz file, and compare it with model.onnx."""
    import numpy as np

    from qcompile import ort
    from qcompile.artifact import open_artifact
    from qcompile.codegen.verilog import artifact as hardware
    from qcompile.errors import InputError, TargetError

    found = open_artifact(artifact)
    if found.manifest["target"]["kind"] != "fpga":
        raise TargetError(f"{artifact} holds no hardware; it was compiled for {found.manifest['target']['kind']}")
    content = json.loads(found.file("program.json").read_text(encoding="utf-8"))
    try:
        with np.load(inputs, allow_pickle=False) as archive:
            feeds = {p["name"]: archive[p["name"]] for p in content["inputs"] if p["name"] in archive.files}
    except Exception as error:
        raise InputError(f"{inputs} is not a readable .npz file: {error}") from None
    frames = hardware.encode_frames(content["inputs"], feeds)
    facts: dict[str, object] = {}
    if simulator == "c":
        results = hardware.run_c(hardware.compile_c(Path(artifact) / "c"), content, frames)
    else:
        results, facts = hardware.run_verilog(Path(artifact) / "verilog", content, frames, simulator, stalls, seed)
    real = hardware.decode_frames(content["outputs"], results)
    wanted = ort.run(ort.session(found.file("model.onnx")), feeds)
    wrong = sum(int((real[name] != wanted[name]).sum()) for name in real)
    if output is not None:
        np.savez(output, **real)
    summary = {"frames": len(next(iter(frames.values()))), "differences": wrong, **facts}
    if as_json:
        click.echo(json.dumps(summary))
    else:
        cycles = f", {facts['cycles']} cycles" if "cycles" in facts else ""
        click.echo(f"{summary['frames']} frames{cycles}; {wrong} values differ from model.onnx")
    if wrong:
        raise TargetError(f"{wrong} values differ from model.onnx")
