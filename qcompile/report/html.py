"""The report as one self-contained page: tables by jinja2, plots by matplotlib as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompile.report.model import LayerRecord, Report

BLUE, ORANGE, GREY = "#3465a4", "#ce5c00", "#888a85"
MAX_ROWS = 60
MAX_RANGES = 12


def write_html(path: Path, report: Report, latency: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Write the page; ``latency`` maps a point (``batch 1, sequence 16, 1 thread``) to milliseconds by contender."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    from qcompile.report.table import facts_of

    environment = Environment(
        loader=PackageLoader("qcompile.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    linears = [layer for layer in report.layers if layer.kind != "embedding"]
    measured = any(layer.output_error is not None for layer in linears)
    plots = [
        (
            "Output error of each layer on calibration data" if measured else "Error of each layer's weight",
            error_plot(linears),
        ),
        ("Size by tensor", size_plot(report)),
        ("Channel ranges of the activations before and after the transforms", range_plot(linears)),
    ]
    if latency:
        plots.append(("Latency", latency_plot(latency)))
    text = environment.get_template("report.html").render(
        report=report,
        title="/".join(Path(report.model).parts[-2:]),
        facts=facts_of(report, sum(report.size.values())),
        plots=[(title, svg) for title, svg in plots if svg],
        latency=latency,
    )
    path.write_text(text, encoding="utf-8")


def _svg(figure: Any) -> str:
    """The figure as SVG text without dates or random ids, so that equal reports are equal files."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "qcompile", "svg.fonttype": "none", "path.simplify": True}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return _compact(text[text.index("<svg") :])


def _compact(svg: str) -> str:
    """The same picture in half the bytes: tenths of a point, one font name, no indentation."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\.0\b|(\.\d)\d", r"\1", path[0]), svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", svg)
    return re.sub(r"\n\s+", "\n", svg)


def _figure(height: float, rows: int = 1, columns: int = 1, width: float = 9.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure, axes


def short(name: str, length: int = 48) -> str:
    """A long name without its middle: layers are told apart by the start and the end."""
    name = name.removesuffix(".codes.weight")
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}\u2026{name[-half:]}"


def error_plot(layers: list[LayerRecord]) -> str:
    """Bars: relative output error by layer, or the weight's own error where there are no data."""
    if not layers:
        return ""
    shown = layers[:MAX_ROWS]
    figure, axes = _figure(0.8 + 0.16 * len(shown))
    axis = axes[0, 0]
    values = [100 * (layer.output_error if layer.output_error is not None else layer.weight_error) for layer in shown]
    axis.barh(range(len(shown)), values, color=BLUE)
    axis.set_yticks(range(len(shown)), [short(layer.name) for layer in shown])
    axis.invert_yaxis()
    axis.set_xlabel("relative error in %", fontsize=8)
    return _svg(figure)


def size_plot(report: Report) -> str:
    """Bars: the largest tensors."""
    if not report.tensors:
        return ""
    largest = sorted(report.tensors.items(), key=lambda item: (-item[1], item[0]))[:30]
    figure, axes = _figure(0.8 + 0.16 * len(largest))
    axis = axes[0, 0]
    axis.barh(range(len(largest)), [size / 1e6 for _, size in largest], color=GREY)
    axis.set_yticks(range(len(largest)), [short(name) for name, _ in largest])
    axis.invert_yaxis()
    axis.set_xlabel("MB", fontsize=8)
    return _svg(figure)


def range_plot(layers: list[LayerRecord]) -> str:
    """Sorted absolute maxima per channel before and after, for layers spread over the model."""
    known = [layer for layer in layers if layer.before and layer.after]
    if not known:
        return ""
    step = max(1, len(known) // MAX_RANGES)
    chosen = known[::step][:MAX_RANGES]
    columns = 4
    figure, axes = _figure(1.6 * -(-len(chosen) // columns), -(-len(chosen) // columns), columns)
    for axis, layer in zip(axes.flat, chosen):
        for values, color, label in ((layer.before, ORANGE, "before"), (layer.after, BLUE, "after")):
            assert values is not None
            ordered = sorted(values, reverse=True)
            points = sorted({int(i * (len(ordered) - 1) / 127) for i in range(128)})
            axis.plot(points, [ordered[i] for i in points], color=color, linewidth=1, label=label)
        if any(v > 0 for v in (*(layer.before or ()), *(layer.after or ()))):
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter("")
        axis.set_title(short(layer.name, 36), fontsize=6)
    for axis in list(axes.flat)[len(chosen) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=6, frameon=False)
    figure.tight_layout()
    return _svg(figure)


def latency_plot(latency: Mapping[str, Mapping[str, float]]) -> str:
    """Grouped bars: milliseconds by contender at every point, each point relative to its slowest."""
    points = list(latency)
    contenders = list(dict.fromkeys(name for values in latency.values() for name in values))
    figure, axes = _figure(0.8 + 0.16 * len(points) * (len(contenders) + 1))
    axis = axes[0, 0]
    colors = [BLUE, ORANGE, GREY, "#75507b", "#4e9a06", "#c4a000"]
    for index, name in enumerate(contenders):
        places = [p * (len(contenders) + 1) + index for p in range(len(points))]
        values = [latency[p].get(name, 0.0) for p in points]
        longest = [max(latency[p].values()) for p in points]
        axis.barh(places, [v / m for v, m in zip(values, longest)], color=colors[index % len(colors)], label=name)
        for place, value, most in zip(places, values, longest):
            axis.text(value / most + 0.01, place, f"{value:.2f} ms", va="center", fontsize=6)
    axis.set_yticks([p * (len(contenders) + 1) + (len(contenders) - 1) / 2 for p in range(len(points))], points)
    axis.invert_yaxis()
    axis.set_xlabel("time relative to the slowest", fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.08, 1))
    return _svg(figure)
