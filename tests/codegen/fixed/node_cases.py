"""Programs of one node each, over odd shapes, and vectors that reach the corners of their arithmetic."""

from __future__ import annotations

import os

import numpy as np

from qcompile.codegen.fixed.nodes import (
    Add,
    Affine,
    Concat,
    Depthwise,
    Geometry,
    Lookup,
    MatMul,
    MatVec,
    MaxPool,
    Multiply,
    Normalize,
    Prepend,
    Select,
    Softmax,
    TokenSum,
    Transpose,
    Window,
)
from qcompile.codegen.fixed.nodes.attention import exp_table
from qcompile.codegen.fixed.rounding import with_rounding
from qcompile.codegen.fixed.stream import Stream
from qcompile.formats.fixed import IntType, Requantize

VECTORS = int(os.environ.get("QCOMPILE_FPGA_VECTORS", "200"))
"""Frames per node; tests of hardware take as many, LLVM a tenth."""

INT8, UINT8, INT4 = IntType(8, True), IntType(8, False), IntType(4, True)


def one(value: int) -> np.ndarray:
    return np.array([value], np.int64)


def requantize(rng, n, low=-128, high=127, reach=0.02):
    return Requantize.from_scale(rng.uniform(reach / 4, reach, n), low, high)


def ties(n, shift=6, low=-128, high=127):
    """A requantization in which every second odd accumulator of low magnitude is a tie."""
    return Requantize(np.full(n, 1 << (shift - 2), np.int64), shift, low, high)


def matvec(rng, name="fc", tokens=3, k=12, n=6, w=INT4, x=INT8, step=None, **hardware):
    weight = rng.integers(w.low, w.high + 1, (k, n))
    weight.flat[:2] = w.low, w.high
    step = requantize(rng, n) if step is None else step
    return MatVec(name, (Stream.of(f"{name}_x", tokens, k, x),), weight, rng.integers(-300, 300, n), step, **hardware)


def half_up(rng, name):
    """Rounds half up, which the constant unit turns into an addition to the bias."""
    node = matvec(rng, name, step=Requantize(one(1), 5, -128, 127))
    weight, bias, step = with_rounding(node.weight, node.bias, node.requantize, "half-up")
    return MatVec(name, node.inputs, weight, bias, step, products="constant")


def grouped(rng, name="fc_serial_groups", groups=3, length=8, last=8, n=6, bits=4):
    """Groups of weights with scales of either sign, dequantized after their sums; ``last`` is the length of the last one."""
    kind = IntType(bits, True)
    codes = rng.integers(kind.low, kind.high + 1, ((groups - 1) * length + last, n))
    scale = rng.integers(-99, 128, (groups, n))
    weight = codes * np.repeat(scale, length, axis=0)[: len(codes)]
    x = Stream.of(f"{name}_x", 3, len(codes), INT8)
    step = requantize(rng, n, reach=0.0005)
    return MatVec(
        name,
        (x,),
        weight,
        rng.integers(-9999, 9999, n),
        step,
        products="serial",
        group_scale=scale,
        group_length=length,
    )


def nodes(rng):
    """One node of every kind and variant, by name."""
    image = Stream.of("image", 30, 6, INT8)  # 5 x 6 pixels
    pixels = Geometry(5, 6, (3, 3), (1, 1), (1, 1, 1, 1))
    strided = Geometry(5, 6, (3, 2), (2, 3), (0, 1, 1, 0))
    dilated = Geometry(5, 6, (2, 2), (1, 2), (0, 0, 0, 0), (2, 3))
    beyond = Geometry(5, 6, (1, 2), (1, 3), (2, 1, 2, 0))  # rows of windows above and below the image
    tokens = Stream.of("tokens", 5, 12, INT8)
    other = Stream.of("other", 5, 12, INT8)
    two_heads_q, two_heads_k = Stream.of("q", 5, 12, INT8), Stream.of("k", 7, 12, INT8)
    codes = Stream.of("codes", 5, 14, IntType(4, False))
    logits = Stream.of("logits", 5, 14, INT8)
    found = [
        matvec(rng, "fc"),
        matvec(rng, "fc_ties", step=ties(6)),
        matvec(rng, "fc_relu", step=requantize(rng, 6, 0, 255)),
        matvec(rng, "fc_shift", step=Requantize(one(1), 7, -8, 7)),
        matvec(rng, "fc_powers", step=Requantize(1 << np.arange(6), 9, -128, 127)),
        matvec(rng, "fc_raw", step=None, w=IntType(8, True)),
        matvec(rng, "fc_binary", w=IntType(1, False), x=UINT8),
        matvec(rng, "fc_ternary", w=IntType(2, True)),
        matvec(rng, "fc_w3", w=IntType(3, True), x=UINT8),
        matvec(rng, "fc_w8", w=IntType(8, True), step=requantize(rng, 6, reach=0.001)),
        matvec(rng, "fc_dsp", products="dsp"),
        matvec(rng, "fc_constant", products="constant"),
        matvec(rng, "fc_constant_ties", step=ties(6), products="constant"),
        matvec(rng, "fc_constant_relu", step=Requantize(one(1), 4, 0, 200), x=UINT8, products="constant"),
        half_up(rng, "fc_constant_half_up"),
        matvec(rng, "fc_thresholds", step=requantize(rng, 6, -8, 7, reach=0.01), scaling="thresholds"),
        matvec(rng, "fc_thresholds_relu", step=requantize(rng, 6, 0, 5, reach=0.005), scaling="thresholds"),
        matvec(rng, "fc_serial", products="serial"),
        matvec(rng, "fc_serial_one_bit", w=IntType(1, False), x=UINT8, products="serial"),
        matvec(rng, "fc_serial_w8", w=IntType(8, True), step=ties(6, 9), products="serial"),
        matvec(
            rng,
            "fc_serial_thresholds",
            step=requantize(rng, 6, -8, 7, reach=0.01),
            products="serial",
            scaling="thresholds",
        ),
        grouped(rng),
        grouped(rng, "fc_serial_groups_odd", 4, 12, 6),
        Window("window", (image,), pixels),
        Window("window_strided", (image,), strided),
        Window("window_dilated", (image,), dilated),
        Depthwise(
            "depthwise", (image,), pixels, rng.integers(-8, 8, (9, 6)), rng.integers(-99, 99, 6), requantize(rng, 6)
        ),
        Depthwise("depthwise_ties", (image,), strided, rng.integers(-8, 8, (6, 6)), rng.integers(-9, 9, 6), ties(6)),
        Depthwise("depthwise_beyond", (image,), beyond, rng.integers(-8, 8, (2, 6)), rng.integers(-9, 9, 6), ties(6)),
        Depthwise(
            "average",
            (image,),
            Geometry(5, 6, (2, 2), (2, 2)),
            np.ones((4, 6), np.int64),
            np.zeros(6, np.int64),
            Requantize(one(1), 2, -128, 127),
        ),
        MaxPool("maxpool", (image,), Geometry(5, 6, (3, 3), (2, 2), (1, 1, 1, 1))),
        Affine("affine", (tokens,), requantize(rng, 12, reach=1.5), rng.integers(-4000, 4000, (5, 12))),
        Affine("rescale", (tokens,), ties(1), np.zeros((1, 12), np.int64)),
        Affine("clamp", (tokens,), Requantize(one(1), 0, 0, 100), np.zeros((1, 12), np.int64)),
        Lookup("lookup", (tokens,), rng.integers(-128, 128, 256)),
        Add("add", (tokens, other), (5, 3), 3, -128, 127),
        Add("add_relu", (tokens, other), (217, 301), 9, 0, 255),
        Multiply("multiply", (tokens, other), Requantize(one(37), 12, -128, 127)),
        Concat("concat", (tokens, Stream.of("third", 5, 9, UINT8))),
        Prepend("prepend", (tokens,), rng.integers(-100, 100, (1, 12))),
        Select("select", (tokens,), (1, 4), (6, 9)),
        Transpose("transpose", (tokens,)),
        TokenSum("token_sum", (image,), Requantize.from_scale(one(1) / 30, -128, 127)),
        MatMul("scores", (two_heads_q, two_heads_k), 2, True, Requantize.from_scale(one(1) * 0.003, -128, 127)),
        MatMul("values", (codes, two_heads_k), 2, False, Requantize.from_scale(one(1) * 2e-5, -128, 127), 15),
        Softmax("softmax", (logits,), exp_table(0.05, INT8), 2),
        Normalize("layer_norm", (tokens,), 3),
        Normalize("layer_norm_power", (Stream.of("eight", 3, 8, INT8),), 3),
        Normalize("rms_norm", (Stream.of("odd", 4, 9, UINT8),), 1, centred=False),
    ]
    return {node.name: node for node in found}


def vectors(node, rng, count):
    """Frames for every input of ``node``: all lowest, all highest, all zero, rows of extremes, then random."""
    return list(frames(node.inputs, rng, count).values())


def frames(streams, rng, count):
    """The same for streams, by name."""
    found = {}
    for stream in streams:
        x = rng.integers(stream.low, stream.high + 1, (count, *stream.shape))
        x[0], x[1] = stream.low, stream.high
        if count > 3:
            x[2] = np.clip(0, stream.low, stream.high)
            x[3] = np.where(np.arange(stream.tokens)[:, None] % 2, stream.low, stream.high)
        found[stream.name] = x
    return found
