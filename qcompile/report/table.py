"""The report as a short table for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qcompile.report.model import Report

MAX_REFUSALS = 8


def print_report(report: Report, size: int, extra: list[tuple[str, str]] | None = None, console: Any = None) -> None:
    """Print size, bits per weight, error against float, kernels and refusals; ``extra`` rows follow the facts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for key, value in [*facts_of(report, size), *(extra or [])]:
        facts.add_row(key, escape(value))  # names have brackets
    console.print(facts)
    kinds = Counter(
        (layer.weight_format, layer.activation_format, layer.solver, layer.kernel or "-") for layer in report.layers
    )
    if kinds:
        table = Table(
            "sites", "weights", "activations", "solver", "kernel", "mean output error", box=None, pad_edge=False
        )
        for (weight, activation, solver, kernel), count in kinds.most_common():
            errors = [
                layer.output_error
                for layer in report.layers
                if (layer.weight_format, layer.activation_format, layer.solver, layer.kernel or "-")
                == (weight, activation, solver, kernel)
                and layer.output_error is not None
            ]
            mean = f"{100 * sum(errors) / len(errors):.2f} %" if errors else "-"
            table.add_row(str(count), weight, activation, solver, kernel, mean)
        console.print(table)
    if report.refusals:
        console.print("[bold]left undone[/]")
        for refusal in report.refusals[:MAX_REFUSALS]:
            console.print(f"  {refusal.what}: {refusal.where}: {refusal.reason}", highlight=False, markup=False)
        if (more := len(report.refusals) - MAX_REFUSALS) > 0:
            console.print(f"  and {more} more, see report.html")


def facts_of(report: Report, size: int) -> list[tuple[str, str]]:
    """Pairs of name and value that sum a compile up."""
    rows = [
        ("model", report.model),
        ("target", report.target),
        ("recipe", report.recipe),
        ("size", f"{size / 1e6:.2f} MB"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
    ]
    rows += [("transform", line) for line in report.transforms]
    if report.proof:
        rows.append(("proof", ", ".join(f"{what} {error:.1e}" for what, error in report.proof.items())))
    quality = report.quality
    if "program_to_float_cosine" in quality:
        rows.append(
            ("cosine to float", f"{quality['program_to_float_cosine']:.5f} (mean of {quality['samples']:.0f} samples)")
        )
        rows.append(("error against float", f"{100 * quality['program_to_float_error']:.3f} %"))
        rows.append(("program against model.onnx", f"{quality['program_to_onnx_error']:.2e}"))
    elif "onnx_to_float_cosine" in quality:
        rows.append(
            ("cosine to float", f"{quality['onnx_to_float_cosine']:.5f} (model.onnx, {quality['samples']:.0f} samples)")
        )
    kernels = ", ".join(f"{name} x{count}" for name, count in sorted(report.kernels.items(), key=lambda kv: -kv[1]))
    rows.append(("kernels", kernels or "-"))
    return rows
