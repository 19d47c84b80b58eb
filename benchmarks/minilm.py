"""The figures of the main job on all-MiniLM-L6-v2: quality, size, compile and load time, latency beside ONNX Runtime.

    python benchmarks/minilm.py [--recipe w8a8 --recipe w4a8 --recipe w2a8] [--output docs/minilm.md]

Every peer runs in this process, in turns with the compiled program. Give the machine nothing else to do.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from qcompile.bench import OrtPeers, Point, compare
from qcompile.capture import capture
from qcompile.compiled import load
from qcompile.demo import bundled, cosine_to_float, minilm_directory
from qcompile.passes.recognise import recognise

LOAD = """
import sys, time
start = time.perf_counter()
import numpy as np
import qcompile
model = qcompile.load(sys.argv[1])
model(np.ones((1, 16), np.int64), np.ones((1, 16), np.int64))
seconds = time.perf_counter() - start
mapped = open("/proc/self/maps").read()
print(seconds, "libtvm_compiler" in mapped)
"""


def cpu_name() -> str:
    """Model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def compile_cold(recipe: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of ``qcompile compile`` as a process of its own."""
    command = [sys.executable, "-m", "qcompile", "compile", str(minilm_directory()), "--recipe", recipe, "--quiet"]
    command += ["--calibration", str(bundled("calibration_sentences.txt")), "-o", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return time.perf_counter() - start, peak


@click.command()
@click.option("--recipe", "recipes", multiple=True, default=("w8a8", "w4a8", "w2a8"))
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--seconds", default=3.0, help="Measuring time of each contender at each point.")
@click.option("--threads", "counts", multiple=True, type=int, default=(1, 2))
def main(recipes: tuple[str, ...], output: Path | None, seconds: float, counts: tuple[int, ...]) -> None:
    captured = capture(minilm_directory(), check=False)
    graph, _ = recognise(captured.model)
    peers = OrtPeers(graph)
    cores = len(os.sched_getaffinity(0))
    points = [
        Point((("batch", b), ("sequence", s)), t)
        for t in counts
        if t <= cores
        for b, s in ((1, 16), (1, 128), (8, 16), (8, 128))
    ]
    lines = [f"Measured on {cpu_name()}, {cores} cores, by `python benchmarks/minilm.py`.", ""]
    lines += [
        "| recipe | mean cosine | lowest | MB | bits per weight | compile s | compile GB | load to first result s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tables = {}
    with tempfile.TemporaryDirectory() as root:
        for recipe in recipes:
            folder = Path(root) / recipe
            took, peak = compile_cold(recipe, folder)
            model = load(folder)
            quality = cosine_to_float(model, graph, captured.tokenizer, bundled("heldout_sentences.txt"))
            answer = subprocess.run(
                [sys.executable, "-c", LOAD, str(folder)], check=True, capture_output=True, text=True
            ).stdout.split()
            assert answer[1] == "False", "the compiler library was loaded at run time"
            bits = model.report.bits_per_weight
            lines.append(
                f"| {recipe} | {quality['mean']:.5f} | {quality['lowest']:.5f} | {model.size / 1e6:.2f} | {bits:.2f} | {took:.0f} | {peak:.2f} | {float(answer[0]):.2f} |"
            )
            if recipe in ("w8a8", "w4a8"):
                tables[recipe] = compare(model.program, peers, points, label=recipe, seconds=seconds)
    lines += [
        "",
        "Peers' model files: "
        + ", ".join(f"{OrtPeers.LABELS[f]} {peers.size(f) / 1e6:.1f} MB" for f in peers.forms)
        + ".",
    ]
    for recipe, table in tables.items():
        names = list(next(iter(table.values())))
        lines += ["", f"Milliseconds of {recipe}, and in parentheses each peer's time as a multiple of it.", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for point, values in table.items():
            cells = [
                f"{values[n]:.2f}" + ("" if n == recipe else f" ({values[n] / values[recipe]:.2f}x)") for n in names
            ]
            lines.append(f"| {point} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    if output is not None:
        output.write_text("# Figures on all-MiniLM-L6-v2\n\n" + text, encoding="utf-8")
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    json.dump(tables, sys.stderr)


if __name__ == "__main__":
    main()
