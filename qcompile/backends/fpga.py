"""FPGAs: a fixed-point program as C99, HLS C++ and Verilog, all of which give the same integers.

The model must be quantized statically; operands that the recipe does not reach (sums, activations, logits) get their scales
here, from the calibration samples. The artifact holds sources, not binaries:

    model.onnx        the program in integer operators, for ONNX Runtime
    c/                C99: the program, and a main that runs vectors
    hls/              C++ for Vitis HLS, headers to simulate it without the tool
    verilog/          Verilog-2005 with AXI4-Stream ports, memory contents, a test bench with vectors
    hardware.json     every node: shapes, ranges, widths, folding, cycles, area
    program.json      inputs and outputs, their scales and order in the streams
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qcompile.backends import Backend, Job
from qcompile.errors import CalibrationError, TargetError
from qcompile.runtime import Checked, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompile.codegen.fixed.importer import Imported

VECTORS = 16
"""Frames that the test benches run."""

LIMITS = {"pe-budget": "pe_budget", "luts": "luts", "target-cycles": "cycles"}
"""Of the folding: names of options, and what `folding.search` calls them."""


class Fpga(Backend):
    """Compiles for FPGAs."""

    options: ClassVar[Mapping[str, str]] = {
        "pe-budget": "products formed per cycle by all nodes together, at most",
        "luts": "look-up tables, at most (estimated)",
        "target-cycles": "cycles per frame, at most; the least area that reaches them",
        "products": "how products are formed: lut (adders), dsp (multipliers), serial (a bit of the weights per cycle), "
        "constant (a token per cycle; adders made for the matrix)",
        "scales": "of activations: any, or powers (of two; sums are then scaled by shifts)",
        "scaling": "how sums become outputs of at most 4 bits: multiply, or thresholds (no multiplier)",
        "measure": "yes to synthesise with Yosys and put what it finds beside the estimates of the report",
        "softmax-bits": "bits of attention's probabilities, as powers of two (4)",
    }

    def check_options(self, options: Mapping[str, Any], emit: tuple[str, ...]) -> None:
        """Refuse what this backend does not know, limits that are no numbers, and measuring without the tool for it.

        Raises:
            TargetError: naming the option or the tool.
        """
        super().check_options(options, emit)
        for name in (*LIMITS, "softmax-bits"):
            value = str(options.get(name, 0))
            if not (value.isascii() and value.isdigit()):
                raise TargetError(f"{name} is a whole number, not {value!r}")
        measure = str(options.get("measure", "no"))
        if measure not in ("yes", "no"):
            raise TargetError(f"hardware is measured or not, yes or no, not {measure!r}")
        if measure == "yes":
            from qcompile.codegen.verilog import tools

            tools.require("yosys")

    def emit(self, job: Job) -> None:
        """Write sources, ``model.onnx`` and the descriptions."""
        from qcompile.codegen.fixed.importer import import_model
        from qcompile.codegen.verilog import artifact

        with job.stage("quantize what is left"):
            model = static_model(job)
            job.save("static", model)
        with job.stage("fixed point"):
            imported = import_model(model, "model")
            imported = dataclasses.replace(imported, program=fold(imported, job.options, job.target))
        with job.stage("generate code"):
            vectors = _vectors(imported, job)
            netlist = artifact.write(imported, vectors, job.folder, job.target)
            summary = artifact.describe(imported, netlist)
            if str(job.options.get("measure", "no")) == "yes":
                artifact.measure(summary, job.folder / "verilog", netlist.name, job.target)
            write_json(job.folder / "hardware.json", summary)
            write_json(job.folder / "program.json", program_json(imported, netlist))
        for node in imported.program.nodes:
            job.report.kernels[node.kind] = job.report.kernels.get(node.kind, 0) + 1
        for note in imported.notes:
            job.report.refuse(note.what, note.where, note.reason)
        asked = job.options.get("products")
        for node in imported.program.nodes:
            if asked and getattr(node, "products", asked) != asked:
                reason = f"{node.kind} has no such unit; it takes {node.products}"
                job.report.refuse(f"products={asked}", node.name, reason)
        job.report.hardware = summary

    def load(self, folder: Path, target: Mapping[str, Any]) -> Any:
        """The program as a C library would run it: through `FixedRunner`."""
        return FixedRunner(folder)


def static_model(job: Job) -> ir.Model:
    """The quantized stage with a static quantizer in front of every operand."""
    from qcompile.calibration import collect
    from qcompile.passes.decompose import decompose
    from qcompile.passes.static import close, is_probability, open_values, round_scales
    from qcompile.passes.weights import DEQUANTIZERS

    if dynamic := [n for n in job.quantized.graph if n.op_type in ("QuantizePerToken", "QuantizePerSample")]:
        raise TargetError(
            f"{dynamic[0].inputs[0].name!r} gets its scale at run time, in hardware scales are constants: "
            "take a recipe such as fixed-w8a8 or fixed-w4a8, or the activation format int8/tensor"
        )
    model = decompose(job.quantized, {"Attention"}, keep={"Bipolar", *DEQUANTIZERS})
    missing = [v.name or "" for v in open_values(model) if not is_probability(v)]
    scales: dict[str, float] = {}
    if missing:
        if not job.feeds:
            raise CalibrationError("static activations need samples: give `calibration` (`--calibration`)")
        statistics = collect(model, job.feeds, missing)
        scales = {name: max(s.percentile(99.999), 1e-12) / 127 for name, s in statistics.items()}
    kind = str(job.options.get("scales", "any"))
    if kind not in ("any", "powers"):
        raise TargetError(f"scales of activations are any or powers, not {kind!r}")
    closed = close(model, scales, log2_bits=int(job.options.get("softmax-bits", 4)))
    return round_scales(closed) if kind == "powers" else closed


def fold(imported: Imported, options: Mapping[str, Any], target: Any) -> Any:
    """The program, folded as the options say."""
    from qcompile.codegen.verilog.folding import search

    program = imported.program
    products = str(options.get("products", "lut"))
    if products not in ("lut", "dsp", "serial", "constant"):
        raise TargetError(f"products are formed by lut, dsp, serial or constant, not {products!r}")
    scaling = str(options.get("scaling", "multiply"))
    if scaling not in ("multiply", "thresholds"):
        raise TargetError(f"sums are scaled by multiply or thresholds, not {scaling!r}")
    nodes = []
    for node in program.nodes:
        if hasattr(node, "scaling"):
            node = dataclasses.replace(node, scaling=scaling)
        matrices_only = products in ("serial", "constant") and node.kind != "matvec"
        has = hasattr(node, "products") and not matrices_only
        nodes.append(dataclasses.replace(node, products=products) if has else node)
    program = dataclasses.replace(program, nodes=tuple(nodes))
    limits = {key: int(options[name]) for name, key in LIMITS.items() if name in options}
    return search(program, target, **(limits or {"pe_budget": 64}))


def _vectors(imported: Imported, job: Job) -> dict[str, np.ndarray]:
    """Frames of integers for the test benches, from the calibration samples, with the outputs of the numpy definition."""
    from qcompile.codegen.verilog.artifact import encode

    frames = {}
    for port in imported.inputs:
        samples = [feed[port.name] for feed in job.feeds[:VECTORS]]
        real = np.concatenate(samples)[:VECTORS] if samples else np.zeros((1, *port.shape), np.float32)
        stream = imported.program.streams[port.stream]
        flat = encode(np.asarray(real, np.float32), port.scale, stream.type, port.index.reshape(-1))
        frames[port.stream] = flat.reshape(len(flat), *stream.shape)
    return {**frames, **imported.program.reference(frames)}


def program_json(imported: Imported, netlist: Any) -> dict[str, Any]:
    """What `FixedRunner` and the simulators need to know."""

    def ports(which: Any, channels: Any) -> list[dict[str, Any]]:
        found = []
        for port, channel in zip(which, channels):
            stream = imported.program.streams[port.stream]
            found.append(
                {
                    "name": port.name,
                    "dtype": "float32",
                    "shape": ["batch", *port.shape],
                    "stream": port.stream,
                    "port": channel.name,
                    "tokens": stream.tokens,
                    "channels": stream.channels,
                    "bits": stream.type.bits,
                    "signed": stream.type.signed,
                    "scale": port.scale,
                    "index": port.index.reshape(-1).tolist(),
                    "lanes": channel.lanes,
                    "beats": channel.beats,
                }
            )
        return found

    target = netlist.target
    return {
        "name": imported.program.name,
        "inputs": ports(imported.inputs, netlist.inputs),
        "outputs": ports(imported.outputs, netlist.outputs),
        "target": {"kind": target.kind, "cpu": target.cpu, "features": sorted(target.features)},
    }


def write_json(path: Path, content: Any) -> None:
    """Write plain values."""
    path.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n", encoding="utf-8")


class FixedRunner(Checked):
    """Runs the C99 sources of an artifact, compiled by the system's compiler into a temporary folder."""

    def __init__(self, folder: Path) -> None:
        from qcompile.codegen.verilog.artifact import compile_c

        content = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        self._ports = content
        specs = {
            key: [TensorSpec(p["name"], p["dtype"], tuple(p["shape"])) for p in content[key]]
            for key in ("inputs", "outputs")
        }
        super().__init__(specs["inputs"], specs["outputs"])
        self._binary = compile_c(folder / "c")

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run with inputs by name; returns every output by name.

        Raises:
            InputError: an input is missing, unknown, has the wrong shape or holds NaN.
        """
        from qcompile.codegen.verilog.artifact import decode_frames, encode_frames, run_c

        self._check_names(feeds)
        frames = encode_frames(self._ports["inputs"], feeds)
        return decode_frames(self._ports["outputs"], run_c(self._binary, self._ports, frames))
