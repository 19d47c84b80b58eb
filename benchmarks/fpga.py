"""Hardware beside that of other generators: look-up tables, flip-flops, clock, and equal numbers.

    python benchmarks/fpga.py matrix jet simulated folded fmax estimate numerics [--peers PYTHON]

All Verilog goes through one Yosys with the same options. Peers are run by ``--peers``, a Python that has da4ml and hls4ml (with
torch); rows that need one say so where it is missing. Prints a table per row. FINN's figure is its formula for look-up
tables (Blott et al., "FINN-R" (2018), section 5), which includes no requantization.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.codegen.fixed.nodes import MatVec
from qcompile.codegen.fixed.program import Program
from qcompile.codegen.fixed.rounding import with_rounding
from qcompile.codegen.fixed.stream import Stream
from qcompile.codegen.verilog import area, hardware, simulate, synthesize, tools, top
from qcompile.formats.fixed import IntType, Requantize
from qcompile.targets.fpga import TARGETS

HERE = Path(__file__).parent
INT8 = IntType(8, True)
JET = (16, 64, 32, 32, 5)
"""Widths of the jet tagging network of hls4ml's papers (Duarte et al. (2018))."""


def program(nodes: list[MatVec]) -> Program:
    """A chain of layers."""
    return Program("dut", nodes[0].inputs, tuple(nodes), (nodes[-1].name,))


def write(nodes: list[MatVec], folder: Path, device: str = "xc7") -> tuple[list[str], hardware.Netlist]:
    """The Verilog of a chain of layers."""
    netlist = hardware.make_netlist(program(nodes), TARGETS[device])
    return top.write(netlist, folder), netlist


def cells(folder: Path, module: str, files: list[str], device: str = "xc7", options: str = "") -> synthesize.Synthesis:
    """Synthesise one module."""
    return synthesize.synthesize(folder, module, files, TARGETS[device], options=options)


def row(*columns: object) -> None:
    """A line of a table."""
    print("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in columns) + " |", flush=True)


# Constant layers beside da4ml.


def jet_layers(seed: int = 11) -> tuple[dict[str, np.ndarray], list[MatVec]]:
    """4-bit weights, 8-bit activations, shifts that round half up: as arrays for peers, and as nodes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (2000, JET[0]))
    arrays, nodes, h = {"x": x}, [], x
    stream = Stream.of("x", 1, JET[0], INT8)
    for i, (k, n) in enumerate(itertools.pairwise(JET)):
        weight = np.clip(np.rint(rng.normal(0, 3, (k, n))), -8, 7).astype(np.int64)
        bias = np.rint(rng.normal(0, (h @ weight).std() / 2, n)).astype(np.int64)
        total = h @ weight + bias
        shift = int(np.ceil(np.log2(np.quantile(total, 0.999) / 255))) if i < len(JET) - 2 else -1
        arrays |= {f"w{i}": weight, f"b{i}": bias, f"s{i}": np.array(shift)}
        step = None
        if shift >= 0:
            h = np.clip((total + (1 << shift >> 1)) >> shift, 0, 255)
            step = Requantize(np.ones(1, np.int64), shift, 0, 255)
            weight, bias, step = with_rounding(weight, bias, step, "half-up")
        nodes.append(MatVec(f"fc{i}", (stream,), weight, bias, step, products="constant").folded(n, k))
        stream = nodes[-1].output
    return arrays, nodes


def matrix_layers(seed: int = 7) -> tuple[dict[str, np.ndarray], list[MatVec]]:
    """A 64 x 32 matrix of uniform 4-bit weights."""
    rng = np.random.default_rng(seed)
    weight, x = rng.integers(-8, 8, (64, 32)), rng.integers(-128, 128, (2000, 64))
    bias = np.zeros(32, np.int64)
    node = MatVec("fc", (Stream.of("x", 1, 64, INT8),), weight, bias, None, products="constant").folded(32, 64)
    return {"x": x, "w0": weight, "b0": bias, "s0": np.array(-1)}, [node]


Layers = Callable[[int], tuple[dict[str, np.ndarray], list[MatVec]]]


def beside_da4ml(title: str, make: Layers, seeds: Sequence[int], runs: int, peers: str) -> None:
    """Our pipelines and da4ml's, with a register after every adder, without FIFOs.

    Args:
        title: of the table.
        make: arrays for the peer and nodes, of a seed.
        seeds: of the weights.
        runs: of da4ml for each seed; its graph differs from run to run, ours does not.
        peers: a Python that has da4ml.
    """
    print(f"\n{title}\n\n| seed | | stages | LUT | FF | LUT + FF | values |\n|---|---|---|---|---|---|---|")
    for seed in seeds:
        arrays, nodes = make(seed)
        expected = program(nodes).reference({"x": arrays["x"][:, None]})[nodes[-1].name][:, 0]
        depth, ours = unrolled(nodes)
        table_row(seed, "qcompile", depth, ours, "reference")
        depth, pairs = unrolled(nodes, addends=2)
        table_row(seed, "qcompile, no additions of three", depth, pairs, "reference")
        found = []
        for _ in range(runs):
            stages, theirs, values = da4ml(arrays, peers)
            table_row(seed, "da4ml", stages, theirs, "equal" if (values == expected).all() else "DIFFER")
            found.append(theirs)
        for name, mine in (("ratio", ours), ("ratio, no additions of three", pairs)):
            luts = [mine.luts / t.luts for t in found]
            flipflops = [mine.flipflops / t.flipflops for t in found]
            total = [(mine.luts + mine.flipflops) / (t.luts + t.flipflops) for t in found]
            row(seed, name, "", *(" ".join(f"{v:.3f}" for v in values) for values in (luts, flipflops, total)), "")


def table_row(seed: int, name: str, stages: object, found: synthesize.Synthesis, values: str) -> None:
    """A line of `beside_da4ml`."""
    row(seed, name, stages, found.luts, found.flipflops, found.luts + found.flipflops, values)


def unrolled(nodes: list[MatVec], addends: int = 3) -> tuple[int, synthesize.Synthesis]:
    """Stages and cells of constant layers, without their FIFO, with sums of at most ``addends``."""
    target = dataclasses.replace(TARGETS["xc7"], addends=addends)
    netlist = hardware.make_netlist(program(nodes), target)
    with tempfile.TemporaryDirectory() as temporary:
        files = top.write(netlist, Path(temporary))
        (unit,) = netlist.units
        found = cells(Path(temporary), f"{unit.module}_core", [f for f in files if f != "dut.v"])
    return unit.processes[0].latency - 1, found


def da4ml(arrays: Mapping[str, np.ndarray], peers: str) -> tuple[str, synthesize.Synthesis, np.ndarray]:
    """Stages and cells of da4ml's pipeline, and what its interpreter makes of the vectors."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "layers.npz", **arrays)
        command = [peers, HERE / "peers" / "da4ml_rtl.py", folder / "layers.npz", folder / "da4ml", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{peers} does not run da4ml: {done.stderr.strip().splitlines()[-1]}")
        source = folder / "da4ml" / "src"
        files = [
            str(p.relative_to(source))
            for p in sorted(source.rglob("*.v"))
            if p.name not in ("lookup_table.v", "peer_wrapper.v")
        ]
        found = cells(source, "peer", files)
        values = np.load(folder / "da4ml" / "y.npy")
    return done.stdout.split(" stages")[0].split()[-1], found, values


def simulated() -> None:
    """The Verilog of both pipelines, in Verilator, beside numpy."""
    print(
        "\nVerilog in Verilator, 2,000 vectors\n\n| | random stalls | values that differ | cycles |\n|---|---|---|---|"
    )
    for title, make in (("64x32 matrix", matrix_layers), ("jet network", jet_layers)):
        arrays, nodes = make()
        frames = {"x": arrays["x"][:, None]}
        last = nodes[-1].name
        expected = program(nodes).reference(frames)[last].ravel()
        with tempfile.TemporaryDirectory() as temporary:
            files, netlist = write(nodes, Path(temporary))
            simulator = simulate.build(Path(temporary), "dut", files, netlist.inputs, netlist.outputs)
            for stalls in (0, 1):
                results, traffic = simulator.run(frames, stalls)
                moved = traffic[last].last - traffic["x"].first + 1
                row(title, "yes" if stalls else "no", int((results[last] != expected).sum()), moved)


# The folded unit.


def folded_layer(products: str = "lut", pe: int = 8, simd: int = 8) -> MatVec:
    """64 x 32, 4-bit weights, biases, requantization by 15-bit multipliers and a shift by 20."""
    rng = np.random.default_rng(7)
    weight = rng.integers(-8, 8, (32, 64)).T.copy()
    bias = rng.integers(-2000, 2000, 32)
    step = Requantize(rng.integers(1 << 13, 1 << 15, 32), 20, -128, 127)
    return MatVec("fc", (Stream.of("x", 1, 64, INT8),), weight, bias, step, products=products).folded(pe, simd)


def finn_luts(node: MatVec) -> float:
    """FINN's formula for the look-up tables of its matrix-vector unit, thresholds left out."""
    w, a, simd = node.weight_type.bits, node.inputs[0].type.bits, node.folding.simd
    products = simd * (2 * -(-(w + a) // 6) - 1) * (w + a)
    tree = (w + a) * (2 * simd - 1)
    accumulator = node.k.bit_length() - 1 + w + a - 1
    return 300 + 1.1 * node.folding.pe * (products + tree + accumulator)


def folded() -> None:
    """The folded unit with either kind of products, its FIFO and memories included."""
    print(
        "\n64x32 W4A8 PE=SIMD=8 with requantization, xc7\n\n| | LUT | FF | DSP | estimated LUT |\n|---|---|---|---|---|"
    )
    for products in ("lut", "dsp"):
        node = folded_layer(products)
        with tempfile.TemporaryDirectory() as temporary:
            files, netlist = write([node], Path(temporary))
            found = cells(Path(temporary), "dut", files)
        row(
            f"products={products}",
            found.luts,
            found.flipflops,
            found.multipliers,
            round(area.estimate(netlist.units[0], TARGETS["xc7"]).luts),
        )
    row("FINN's formula, without requantization", round(finn_luts(folded_layer())), "", 0, "")


def fmax() -> None:
    """Clock after place and route."""
    print(
        "\nThe same on ECP5-25k, speed grade 6\n\n| | LUT4 | FF | multipliers | MHz, seeds 1 2 3 | median |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files, _ = write([folded_layer()], folder, "ecp5-25k")
        found = cells(folder, "dut", files, "ecp5-25k")
        clocks = [synthesize.place(folder, "dut", TARGETS["ecp5-25k"], seed=s).megahertz for s in (1, 2, 3)]
    reached = " ".join(f"{c:.1f}" for c in clocks)
    row("products=lut", found.luts, found.flipflops, found.multipliers, reached, statistics.median(clocks))


GRID = ((1, 1), (1, 8), (8, 1), (2, 4), (4, 8), (8, 8), (4, 32), (16, 8))


def estimate() -> None:
    """Look-up tables foretold and found."""
    print(
        "\nEstimates, 64x32 W4A8\n\n| device | PE | SIMD | products | estimated | Yosys | ratio |\n|---|---|---|---|---|---|---|"
    )
    for device in ("xc7", "ecp5-85k"):
        for products in ("lut", "dsp", "serial"):
            for pe, simd in GRID:
                node = folded_layer(products, pe, simd)
                with tempfile.TemporaryDirectory() as temporary:
                    files, netlist = write([node], Path(temporary), device)
                    found = cells(Path(temporary), "dut", files, device)
                guess = sum(area.estimate(u, TARGETS[device]).luts for u in netlist.units)
                row(device, pe, simd, products, round(guess), found.luts, guess / found.luts)


def numerics(peers: str) -> None:
    """The jet network in hls4ml's C simulation."""
    arrays, nodes = jet_layers()
    expected = program(nodes).reference({"x": arrays["x"][:, None]})[nodes[-1].name][:, 0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "layers.npz", **arrays)
        command = [peers, HERE / "peers" / "hls4ml_numbers.py", folder / "layers.npz", folder / "hls4ml"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{peers} does not run hls4ml: {done.stderr.strip()[-500:]}")
        theirs = np.load(folder / "hls4ml" / "y.npy")
    print(
        f"\nhls4ml's C simulation of the jet network: {int((theirs != expected).any(1).sum())} of {len(expected)} vectors differ"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {
        "matrix": lambda a: beside_da4ml(
            "64x32 W4A8, a vector per cycle, xc7", matrix_layers, a.seeds, a.runs, a.peers
        ),
        "jet": lambda a: beside_da4ml("Jet network 16-64-32-32-5, W4A8, xc7", jet_layers, [11], a.runs, a.peers),
        "simulated": lambda a: simulated(),
        "folded": lambda a: folded(),
        "fmax": lambda a: fmax(),
        "estimate": lambda a: estimate(),
        "numerics": lambda a: numerics(a.peers),
    }
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(rows)}; all by default")
    parser.add_argument("--peers", default=sys.executable, help="a Python with da4ml and hls4ml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9], help="of matrices")
    parser.add_argument("--runs", type=int, default=2, help="of da4ml for each network")
    given = parser.parse_args()
    print(
        tools.call([*tools.require("yosys"), "-V"], Path.cwd()).strip(),
        "|",
        TARGETS["xc7"].synthesis,
        "|",
        TARGETS["ecp5-25k"].synthesis,
    )
    for name in given.rows or rows:
        rows[name](given)
