"""``qcompile demo``: the main job on a bundled model, all-MiniLM-L6-v2."""

from __future__ import annotations

import click

RECIPES = {"w8a8": "int8", "w4a8": "nbits4"}


@click.command()
@click.option(
    "-o", "--output", default="artifacts/minilm", show_default=True, type=click.Path(), help="Where the artifact goes."
)
@click.option("--recipe", default="w8a8", show_default=True)
@click.option("--calibration", type=click.Path(), help="Sentences to calibrate on; a bundled list by default.")
@click.option("--heldout", type=click.Path(), help="Sentences to compare on; a bundled list by default.")
@click.option("--target", default="native", show_default=True)
def demo(output: str, recipe: str, calibration: str | None, heldout: str | None, target: str) -> None:
    """Compile all-MiniLM-L6-v2 for this machine, compare it with float, and measure it beside ONNX Runtime."""
    import os
    from pathlib import Path

    from rich.console import Console

    from qcompile.bench import OrtPeers, Point, compare
    from qcompile.capture import capture
    from qcompile.cli.bench import print_latency
    from qcompile.compiler import compile as compile_model
    from qcompile.demo import bundled, cosine_to_float, minilm_directory
    from qcompile.passes.recognise import recognise
    from qcompile.report.html import write_html
    from qcompile.report.table import print_report

    console = Console()
    source = minilm_directory()
    captured = capture(source)
    result = compile_model(
        source,
        target=target,
        recipe=recipe,
        calibration=calibration or bundled("calibration_sentences.txt"),
        output=output,
        overwrite=True,
    )
    graph, _ = recognise(captured.model)
    quality = cosine_to_float(result, graph, captured.tokenizer, heldout or bundled("heldout_sentences.txt"))
    cores = len(os.sched_getaffinity(0))
    points = [
        Point((("batch", batch), ("sequence", sequence)), threads)
        for threads in sorted({1, min(2, cores)})
        for batch, sequence in ((1, 16), (1, 128), (8, 16), (8, 128))
    ]
    with console.status("measuring beside ONNX Runtime"):
        peers = OrtPeers(graph)
        latency = compare(result.program, peers, points, label=f"qcompile {recipe}")
    extra = [
        (
            "held-out sentences",
            f"cosine to float: mean {quality['mean']:.5f}, lowest {quality['lowest']:.5f} over {quality['sentences']:.0f}",
        ),
        ("ORT file sizes", ", ".join(f"{OrtPeers.LABELS[f]} {peers.size(f) / 1e6:.2f} MB" for f in peers.forms)),
    ]
    print_report(result.report, result.size, extra, console)
    print_latency(latency, console)
    page = Path(output).with_suffix(".html")
    result.report.quality |= {f"heldout_{k}": v for k, v in quality.items()}
    write_html(page, result.report, latency)
    console.print(f"artifact: {output}\nreport:   {page}", highlight=False)
