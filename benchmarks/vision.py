"""Convolutional networks in int8 beside ONNX Runtime float and int8, in one process.

    python benchmarks/vision.py [--model resnet18 --model mobilenet_v2] [--size 224] [--seconds 2]

The networks have the published shapes and random weights: what is measured is time. ONNX Runtime's int8 form is what its
`quantize_static` makes (QDQ, per channel), run with ``session.x64quantprecision``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qcompile
from qcompile import ort
from qcompile.bench import measure
from qcompile.runtime import set_threads


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm and activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Basic(nn.Module):
    """Basic block of He et al., "Deep Residual Learning for Image Recognition" (2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, act=None))
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Inverted(nn.Module):
    """Inverted residual of Sandler et al., "MobileNetV2" (2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        first = [conv(inputs, inner, 1, act=nn.ReLU6)] if expand > 1 else []
        self.body = nn.Sequential(
            *first, conv(inner, inner, 3, stride, inner, nn.ReLU6), conv(inner, outputs, 1, act=None)
        )
        self.same = inputs == outputs and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


class Pooled(nn.Module):
    """Features, mean over positions, classifier."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).mean((2, 3)))


def resnet18() -> nn.Module:
    """ResNet-18."""
    blocks = [
        Basic(a, b, s)
        for a, b, s in (
            (64, 64, 1),
            (64, 64, 1),
            (64, 128, 2),
            (128, 128, 1),
            (128, 256, 2),
            (256, 256, 1),
            (256, 512, 2),
            (512, 512, 1),
        )
    ]
    return Pooled(nn.Sequential(conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks), 512)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2, width 1."""

    def blocks() -> Iterator[nn.Module]:
        inputs = 32
        for expand, outputs, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for i in range(count):
                yield Inverted(inputs, outputs, stride if i == 0 else 1, expand)
                inputs = outputs

    return Pooled(nn.Sequential(conv(3, 32, 3, 2, act=nn.ReLU6), *blocks(), conv(320, 1280, 1, act=nn.ReLU6)), 1280)


MODELS = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}


def peer(model: ir.Model, samples: list[dict[str, np.ndarray]], folder: Path) -> Path:
    """ONNX Runtime's own int8 form."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    ir.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return folder / "int8.onnx"


@click.command()
@click.option("--model", "names", multiple=True, default=tuple(MODELS), type=click.Choice(list(MODELS)))
@click.option("--size", default=224)
@click.option("--seconds", default=2.0)
@click.option("--threads", "counts", multiple=True, type=int, default=(1, 2))
def main(names: tuple[str, ...], size: int, seconds: float, counts: tuple[int, ...]) -> None:
    from qcompile.capture import capture
    from qcompile.passes.recognise import recognise

    table = Table("model, threads", "w8a8-static", "ORT float", "ORT int8", box=None)
    for name in names:
        torch.manual_seed(0)
        module = MODELS[name]().eval()
        example = torch.randn(1, 3, size, size)
        samples = [
            {"image": np.random.default_rng(i).standard_normal((1, 3, size, size)).astype(np.float32)} for i in range(4)
        ]
        graph, _ = recognise(capture(module, example_inputs=(example,), check=False).model)
        with tempfile.TemporaryDirectory() as root:
            made = qcompile.compile(
                graph, recipe="w8a8-static", calibration=samples, output=Path(root) / "artifact", transforms=()
            )
            int8 = peer(graph, samples, Path(root))
            for threads in (t for t in counts if t <= len(os.sched_getaffinity(0))):
                set_threads(threads)
                settings = {"session.x64quantprecision": "1"}
                sessions = {
                    f: ort.session(p, threads=threads, settings=settings)
                    for f, p in (("ORT float", Path(root) / "float.onnx"), ("ORT int8", int8))
                }
                runs = {"w8a8-static": made.program.run} | {
                    f: lambda feed, s=s: s.run(None, feed) for f, s in sessions.items()
                }
                times = measure(runs, samples[0], seconds=seconds)
                own = times["w8a8-static"]
                table.add_row(
                    f"{name}, {threads}",
                    *(f"{t:.1f} ms" + ("" if f == "w8a8-static" else f" ({t / own:.2f}x)") for f, t in times.items()),
                )
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
