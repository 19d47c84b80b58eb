"""A fixed-point program as files: C99, HLS C++, Verilog, with vectors; and how they are run again from what was written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.codegen.fixed.emit import c_program, hls_program
from qcompile.codegen.fixed.emit.onnx_model import onnx_model
from qcompile.codegen.fixed.importer import Imported
from qcompile.codegen.verilog import area, simulate, synthesize, timing, tools, top
from qcompile.codegen.verilog.hardware import make_netlist
from qcompile.codegen.verilog.netlist import Channel, Netlist, pack_word
from qcompile.errors import ArtifactError, InputError, TargetError
from qcompile.formats.fixed import IntType
from qcompile.targets.fpga import FpgaTarget


def write(imported: Imported, vectors: Mapping[str, np.ndarray], folder: Path, target: FpgaTarget) -> Netlist:
    """Write ``model.onnx``, ``c/``, ``hls/`` and ``verilog/``; returns the hardware.

    Args:
        imported: folded.
        vectors: frames of integers of every input and output stream, for the test benches.
        folder: exists.
        target: the device.
    """
    program = imported.program
    ir.save(onnx_model(imported), folder / "model.onnx")
    netlist = make_netlist(program, target)
    lanes = {p.stream: c.lanes for p, c in zip(imported.inputs, netlist.inputs)}
    lanes |= {p.stream: c.lanes for p, c in zip(imported.outputs, netlist.outputs)}
    for name, files in (
        ("c", c_program.sources(program, dict(vectors))),
        ("hls", hls_program.sources(program, lanes)),
    ):
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
    for header in sorted(hls_program.INCLUDE.glob("*.h")):
        (folder / "hls" / "simulation").mkdir(exist_ok=True)
        shutil.copy(header, folder / "hls" / "simulation" / header.name)
    top.write(netlist, folder / "verilog")
    _test_bench(imported, netlist, vectors, folder / "verilog")
    return netlist


def _test_bench(imported: Imported, netlist: Netlist, vectors: Mapping[str, np.ndarray], folder: Path) -> None:
    """``test_bench.v``, and a file of beats for every port."""
    ports = []
    for kind, which, channels in (
        ("in", imported.inputs, netlist.inputs),
        ("out", imported.outputs, netlist.outputs),
    ):
        for port, channel in zip(which, channels):
            beats = vectors[port.stream].reshape(-1, channel.lanes)
            text = "\n".join(f"{pack_word(beat, channel.type.bits):x}" for beat in beats)
            (folder / f"{channel.name}.vectors.hex").write_text(text + "\n", encoding="ascii")
            ports.append({"kind": kind, "name": channel.name, "width": top.padded(channel), "beats": len(beats)})
    text = top.render("test_bench.v.j2", top=netlist.name, ports=ports)
    (folder / "test_bench.v").write_text(text, encoding="utf-8")


def describe(imported: Imported, netlist: Netlist) -> dict[str, Any]:
    """Every node and the whole: shapes, exact ranges, widths, folding, cycles and estimated area."""
    program, target = imported.program, netlist.target
    line = timing.evaluate(netlist, 4)
    nodes = []
    total = area.Area()
    for node in program.nodes:
        units = [u for u in netlist.units if u.node == node.name]
        parts = sum((area.estimate(u, target) for u in units), start=area.Area())
        out = node.output
        nodes.append(
            {
                "name": node.name,
                "kind": node.kind,
                "units": [u.name for u in units],
                "inputs": [s.name for s in node.inputs],
                "shape": list(out.shape),
                "range": [int(out.low.min()), int(out.high.max())],
                "type": str(out.type),
                "accumulator": str(node.accumulator) if hasattr(node, "accumulator") else None,
                "pe": node.folding.pe,
                "simd": node.folding.simd,
                "interval": node.interval,
                "latency": sum(u.latency for u in units),
                "estimate": _area(parts),
            }
        )
    for unit in netlist.units:
        total = total + area.estimate(unit, target)
    return {
        "device": target.cpu,
        "nodes": nodes,
        "interval": line.interval(netlist),
        "latency": line.latency(netlist),
        "fifos": {f"{u.name}.{prefix}": depth for u in netlist.units for prefix, depth in u.depths.items()},
        "estimate": _area(total),
    }


def measure(summary: dict[str, Any], folder: Path, name: str, target: FpgaTarget) -> None:
    """Put what Yosys finds beside the estimates of `describe`: for the whole, and for every node on its own.

    Args:
        summary: of `describe`.
        folder: ``verilog/`` of the artifact.
        name: of the top module.
        target: the device.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-synth-") as temporary:
        sources = copy_sources(folder, Path(temporary))
        whole = synthesize.synthesize(Path(temporary), name, sources, target)
        units = synthesize.by_unit(Path(temporary), name, sources, target)
    summary["measured"] = measured([whole])
    for node in summary["nodes"]:
        node["measured"] = measured([units.get(f"u_{unit}", synthesize.NOTHING) for unit in node["units"]])


def measured(found: Sequence[synthesize.Synthesis]) -> dict[str, int]:
    """Counts of several parts together, by the names of the estimates; block memories are blocks, not bits."""
    return {
        name: sum(getattr(part, name) for part in found) for name in ("luts", "flipflops", "multipliers", "memories")
    }


def copy_sources(folder: Path, to: Path) -> list[str]:
    """Copy the Verilog and the memory contents in ``folder``, without the test bench; the names of the Verilog files."""
    for file in folder.iterdir():
        if file.suffix in (".v", ".hex") and file.name != "test_bench.v":
            shutil.copy(file, to / file.name)
    return sorted(p.name for p in to.glob("*.v"))


def _area(found: area.Area) -> dict[str, int]:
    return {
        "luts": round(found.luts),
        "flipflops": round(found.flipflops),
        "multipliers": round(found.multipliers),
        "memory_bits": round(found.memory_bits),
    }


# Running what was written.


def encode_frames(ports: Sequence[Mapping[str, Any]], feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Real inputs by name as frames of integers by stream.

    Raises:
        InputError: an input is missing, has the wrong shape or holds NaN.
    """
    frames = {}
    for port in ports:
        if port["name"] not in feeds:
            raise InputError(f"the input {port['name']!r} is missing; the program takes {[p['name'] for p in ports]}")
        values = np.asarray(feeds[port["name"]], np.float32)
        expected = tuple(port["shape"][1:])
        if values.ndim != len(expected) + 1 or values.shape[1:] != expected:
            raise InputError(
                f"the input {port['name']!r} has shape {values.shape}, the program takes "
                f"({', '.join(map(str, ['batch', *expected]))})"
            )
        if np.isnan(values).any():
            raise InputError(f"the input {port['name']!r} holds NaN, which no integer stands for")
        flat = encode(values, port["scale"], IntType(port["bits"], port["signed"]), port["index"])
        frames[port["stream"]] = flat.reshape(len(flat), port["tokens"], port["channels"])
    if len({len(f) for f in frames.values()}) > 1:
        raise InputError("the inputs have different batch sizes")
    return frames


def encode(values: np.ndarray, scale: float, kind: IntType, index: Any) -> np.ndarray:
    """Real values ``(V, ...)`` as frames of integers ``(V, size)``, what ``QuantizeLinear`` does; ``index`` is their place in the stream."""
    codes = np.clip(np.rint(values / np.float32(scale)), kind.low, kind.high).astype(np.int64)
    flat = np.empty((len(codes), len(index)), np.int64)
    flat[:, index] = codes.reshape(len(codes), len(index))
    return flat


def decode_frames(ports: Sequence[Mapping[str, Any]], frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Frames of integers by stream as real outputs by name, float32."""
    results = {}
    for port in ports:
        flat = frames[port["stream"]].reshape(-1, port["tokens"] * port["channels"])
        codes = flat[:, port["index"]].reshape(-1, *port["shape"][1:])
        results[port["name"]] = codes.astype(np.float32) * np.float32(port["scale"])
    return results


def compile_c(folder: Path, output: Path | None = None) -> Path:
    """Compile the C99 program in ``folder`` and return the executable.

    Raises:
        TargetError: there is no C compiler, or it rejects the program.
    """
    compiler = tools.require("cc")
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="qcompile-c-")) / "program"
    sources = [str(p.absolute()) for p in sorted(folder.glob("*.c"))]
    tools.call([*compiler, "-std=c99", "-O2", *sources, "-o", str(output)], folder)
    return output


def run_c(binary: Path, content: Mapping[str, Any], frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run frames through the compiled C99 program."""
    import subprocess

    count = len(next(iter(frames.values())))
    parts = []
    for i in range(count):
        for port in content["inputs"]:
            parts.append(frames[port["stream"]][i].astype(IntType(port["bits"], port["signed"]).dtype).tobytes())
    done = subprocess.run([binary, "-"], input=b"".join(parts), capture_output=True, check=False)
    if done.returncode:
        raise TargetError(f"{binary} failed with code {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}")
    kinds = [np.dtype(IntType(p["bits"], p["signed"]).dtype) for p in content["outputs"]]
    sizes = [p["tokens"] * p["channels"] for p in content["outputs"]]
    record = np.dtype([(f"f{i}", kind, (size,)) for i, (kind, size) in enumerate(zip(kinds, sizes))])
    table = np.frombuffer(done.stdout, record)
    return {
        p["stream"]: table[f"f{i}"].astype(np.int64).reshape(count, p["tokens"], p["channels"])
        for i, p in enumerate(content["outputs"])
    }


def run_verilog(
    folder: Path,
    content: Mapping[str, Any],
    frames: Mapping[str, np.ndarray],
    simulator: str,
    stalls: int = 0,
    seed: int = 1,
    keep: Path | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Run frames through the Verilog of an artifact.

    Args:
        folder: ``verilog/`` of the artifact.
        content: of ``program.json``.
        frames: integers by input stream.
        simulator: ``verilator`` or ``cxxrtl``.
        stalls, seed: see `qcompile.codegen.verilog.simulate`.
        keep: where to build; a temporary folder by default.

    Returns:
        Frames by output stream, and ``cycles`` from the first beat in to the last beat out.

    Raises:
        TargetError: a tool is missing, or the simulation delivered too few beats.
    """
    sources = sorted(p.name for p in folder.glob("*.v") if p.name != "test_bench.v")
    if not sources:
        raise ArtifactError(f"{folder} holds no Verilog")
    channels = {
        kind: [Channel(p["port"], p["lanes"], IntType(p["bits"], p["signed"]), p["beats"]) for p in content[kind]]
        for kind in ("inputs", "outputs")
    }
    temporary = None
    if keep is None:
        temporary = keep = Path(tempfile.mkdtemp(prefix="qcompile-rtl-"))
    try:
        for file in folder.iterdir():
            if file.suffix in (".v", ".hex"):
                shutil.copy(file, keep / file.name)
        built = simulate.build(keep, content["name"], sources, channels["inputs"], channels["outputs"], simulator)
        feeds = {p["port"]: frames[p["stream"]] for p in content["inputs"]}
        raw, traffic = built.run(feeds, stalls, seed)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    count = len(next(iter(frames.values())))
    results = {}
    for port in content["outputs"]:
        wanted = count * port["tokens"] * port["channels"]
        if raw[port["port"]].size != wanted:
            raise TargetError(f"the simulation delivered {raw[port['port']].size} of {wanted} values of {port['name']}")
        results[port["stream"]] = raw[port["port"]].reshape(count, port["tokens"], port["channels"])
    first = min(traffic[p["port"]].first for p in content["inputs"])
    last = max(traffic[p["port"]].last for p in content["outputs"])
    return results, {"cycles": last - first + 1}
