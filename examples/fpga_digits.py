"""Handwritten digits from a float model to Verilog: trains a small network, compiles it, simulates the hardware on the test set.

    python examples/fpga_digits.py mlp|cnn|vit|mixer|jet [--simulator verilator|cxxrtl|c] [-o DIR]

The data are the 1,797 images of 8 x 8 pixels that scikit-learn brings along; a quarter of them is the test set. ``jet`` has the
widths of the jet tagging network that papers compare, 16-64-32-32-5; it reads the first five digits at 4 x 4 pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import qcompile
from qcompile import ort
from qcompile.codegen.verilog import artifact as hardware


class Residual(nn.Module):
    """Depthwise and pointwise convolution beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``relu(x + pointwise(relu(depthwise(x))))``."""
        return torch.relu(x + self.pointwise(torch.relu(self.norm(self.depthwise(x)))))


def mlp() -> nn.Module:
    """64-64-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def jet() -> nn.Module:
    """16-64-32-32-5."""
    widths = (16, 64, 32, 32)
    layers = [layer for k, n in itertools.pairwise(widths) for layer in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 5))


def cnn() -> nn.Module:
    """Convolution, residual block with depthwise convolution, pooling, strided convolution, global pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Patches(nn.Module):
    """Patches of 2 x 2 pixels as tokens, with positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 1, 8, 8)`` to ``(B, 16, width)``."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, width)`` to the same."""
        b, t, c = x.shape
        q, k, v = (
            f(x).reshape(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, width)`` to the same."""
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Mixer(nn.Module):
    """A block of MLP-Mixer: a small network over tokens, then one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens, self.over_channels = (
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for n in (tokens, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, width)`` to the same."""
        x = x + self.over_tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.second(x))


class Pooled(nn.Module):
    """Patches, a block, the mean of all tokens, a classifier."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.patches, self.block = Patches(width), block
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 1, 8, 8)`` to logits."""
        return self.head(self.norm(self.block(self.patches(x))).mean(1))


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "vit": lambda: Pooled(Block(32, 2), 32),
    "mixer": lambda: Pooled(Mixer(16, 32), 32),
    "jet": jet,
}


def data(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images ``(N, 1, 8, 8)`` in [0, 1], or what ``jet`` reads of them, then their labels."""
    digits = load_digits()
    images, labels = (digits.images[:, None] / 16).astype(np.float32), digits.target
    if name == "jet":
        images = images.reshape(-1, 1, 4, 2, 4, 2).mean((3, 5))[labels < 5]
        labels = labels[labels < 5]
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def train(name: str, images: np.ndarray, labels: np.ndarray, epochs: int = 60) -> nn.Module:
    """Train a model of `MODELS`."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part], label_smoothing=0.05).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def main(
    name: str,
    simulator: str = "c",
    output: str | None = None,
    budget: int = 64,
    epochs: int = 60,
    products: str = "lut",
) -> dict[str, float]:
    """Train, compile, simulate; returns the accuracies in percent and the cycles per frame."""
    train_x, test_x, train_y, test_y = data(name)
    model = train(name, train_x, train_y, epochs)
    with torch.no_grad():
        float_logits = model(torch.from_numpy(test_x)).numpy()
    folder = output or str(Path(tempfile.mkdtemp()) / name)
    compiled = qcompile.compile(
        model,
        target="fpga",
        recipe="fixed-w4a8",
        calibration=[image[None] for image in train_x[:256]],
        output=folder,
        overwrite=True,
        options={"pe-budget": budget, "products": products},
        capture_options={"example_inputs": (torch.from_numpy(train_x[:2]),)},
    )
    content = json.loads((Path(folder) / "program.json").read_text())
    source = content["inputs"][0]["name"]
    np.savez(Path(folder) / "test.npz", **{source: test_x})  # for `qcompile simulate`
    frames = hardware.encode_frames(content["inputs"], {source: test_x})
    if simulator == "c":
        codes = hardware.run_c(hardware.compile_c(Path(folder) / "c"), content, frames)
    else:
        codes, _ = hardware.run_verilog(Path(folder) / "verilog", content, frames, simulator)
    logits = next(iter(hardware.decode_frames(content["outputs"], codes).values()))
    reference = next(iter(ort.run(ort.session(compiled.onnx_path), {source: test_x}).values()))
    return {
        "float": 100 * float((float_logits.argmax(1) == test_y).mean()),
        "hardware": 100 * float((logits.argmax(1) == test_y).mean()),
        "differences": int((logits != reference).sum()),
        "cycles": compiled.report.hardware["interval"],
        "luts": compiled.report.hardware["estimate"]["luts"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--simulator", default="verilator", choices=["verilator", "cxxrtl", "c"])
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--products", default="lut", choices=["lut", "dsp", "constant"])
    parser.add_argument("-o", "--output")
    given = parser.parse_args()
    result = main(given.model, given.simulator, given.output, given.budget, given.epochs, given.products)
    print(
        f"{given.model}: accuracy {result['float']:.2f} % in float, {result['hardware']:.2f} % in hardware, "
        f"{result['differences']} values differ from model.onnx; {result['cycles']} cycles per image, {result['luts']} LUTs estimated"
    )
