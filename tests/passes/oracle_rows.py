"""One small graph for every operator that has a rule, and the dimension of its group, written down by hand."""

from dataclasses import dataclass, field

import numpy as np

N = 4


def positive(*shape, seed=1):
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


@dataclass
class Row:
    """One operator between linear layers.

    ``dimension`` is the expected number, written down by hand; the oracle and the analysis must both agree with it.
    ``ignored`` counts what the oracle sees and the analysis leaves out: directions along which the operator does not look
    (a multiple of the ones vector added to all channels of a mean that is subtracted) or on which its output is constant.
    ``epsilon`` is 1 if the analysis may scale the input and epsilon with it, which the oracle keeps fixed.
    """

    body: str
    dimension: int
    inputs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (3, N)})
    output: tuple[int, ...] = (3, N)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    ignored: int = 0
    epsilon: int = 0
    fixed: tuple[str, ...] = ()
    blocks: tuple[int, ...] | None = None


def ints(*values):
    return np.array(values, np.int64)


TWO = {"a": (3, N), "b": (3, N)}
HALF = N // 2
ROWS = {
    # y = f(x) with a homogeneity: one scale per channel, shared by input and output.
    "relu": Row("y = Relu(x)", N),
    "leaky relu": Row("y = LeakyRelu(x)", N),
    "prelu": Row("y = PRelu(x, s)", N, constants={"s": positive(N) / 4}),
    "max of two": Row("y = Max(a, b)", N, TWO),
    "square": Row("y = Mul(x, x)", N),
    "cube": Row("y = Pow(x, k)", N, constants={"k": np.array(3.0, np.float32)}),
    "abs": Row("y = Abs(x)", N),
    # no homogeneity: permutations only
    "silu": Row("s = Sigmoid(x) y = Mul(x, s)", 0),
    "gelu": Row("y = Gelu(x)", 0),
    "swish": Row("y = Swish(x)", 0),
    "tanh": Row("y = Tanh(x)", 0),
    "softmax": Row("y = Softmax(x)", 0, ignored=N),
    "clip": Row(
        "y = Clip(x, lo, hi)", 0, constants={"lo": np.float32(0).reshape(()), "hi": np.float32(0.8).reshape(())}
    ),
    # linear
    "neg": Row("y = Neg(x)", N * N),
    "sum": Row("y = Add(a, b)", N * N, TWO),
    "scaled by a number": Row("y = Mul(x, k)", N * N, constants={"k": np.array(0.7, np.float32)}),
    "gated units": Row("s = Sigmoid(a) t = Mul(a, s) y = Mul(t, b)", N, TWO),
    "bilinear": Row("y = Mul(a, b)", 2 * N, TWO),
    "quotient": Row("y = Div(a, b)", 2 * N, TWO),
    "relu gate": Row("r = Relu(a) y = Mul(r, b)", 2 * N, TWO),
    # normalisations: R+ on the input, a rotation, and the diagonal that gamma takes
    "rms norm": Row("y = RMSNormalization<epsilon=0.3>(x, g)", 1 + 6 + N, constants={"g": positive(N)}, epsilon=1),
    "layer norm": Row(
        "y = LayerNormalization<epsilon=0.3>(x, g, b)",
        1 + 3 + N,
        constants={"g": positive(N), "b": positive(N, seed=2)},
        ignored=2 * N,
        epsilon=1,
    ),
    "channel constant": Row("y = Mul(x, g)", N * N + N, constants={"g": positive(N)}),
    # structure
    "transpose and back": Row("t = Transpose<perm=[1,0]>(x) y = Transpose<perm=[1,0]>(t)", N * N),
    "two halves swapped": Row("a, b = Split<axis=1, num_outputs=2>(x) y = Concat<axis=1>(b, a)", N * N),
    "one half activated": Row(
        "a, b = Split<axis=1, num_outputs=2>(x) r = Relu(a) y = Concat<axis=1>(r, b)", HALF + HALF**2
    ),
    "slice": Row(
        "h = Slice(x, s, e, ax) t = Tanh(h) y = Concat<axis=1>(t, x)",
        HALF**2,
        output=(3, N + HALF),
        blocks=(HALF, HALF),
        constants={"s": ints(0), "e": ints(HALF), "ax": ints(1)},
    ),
    "gather of channels": Row("y = Gather<axis=1>(x, i)", N * N, constants={"i": ints(2, 0, 3, 1)}),
    "heads": Row(
        "h = Reshape(x, s) t = Softmax<axis=0>(h) y = Reshape(t, r)",
        0,
        constants={"s": ints(3, 2, HALF), "r": ints(3, N)},
    ),
    "sum over positions": Row("m = ReduceMean<keepdims=1>(x, ax) y = Add(x, m)", N * N, constants={"ax": ints(0)}),
    "sum of squares": Row(
        "q = Pow(x, k) m = ReduceMean(q, ax) e = Add(m, k) y = Mul(x, e)",
        6,
        constants={"k": np.array(2.0, np.float32), "ax": ints(1)},
    ),
}


def rotary_tables(length, frequencies):
    angle = np.arange(length)[:, None] * np.array(frequencies)
    return {"c": np.cos(angle), "s": np.sin(angle), "p": np.arange(length)[None]}


LAST_TO_FIRST = "t = Transpose(x) u = Unsqueeze(t, zero)"
FIRST_TO_LAST = "f = Squeeze(c, zero) y = Transpose(f)"
MOVES = {"zero": ints(0)}
CONV = {"inputs": {"x": (5, N)}, "output": (5, N)}
ROWS |= {
    # contractions: dual pairs; softmax over keys makes the scores rigid
    "scores": Row("t = Transpose(k) s = MatMul(q, t) y = Softmax(s)", N * N, {"q": (3, N), "k": (3, N)}, (3, 3)),
    "linear": Row("y = MatMul(x, w)", 2 * N * N, constants={"w": positive(N, N)}),
    "linear with bias": Row(
        "t = MatMul(x, w) y = Add(t, b)", 2 * N * N, constants={"w": positive(N, N), "b": positive(N, seed=3)}
    ),
    "gemm": Row("y = Gemm<transB=1>(x, w, b)", 2 * N * N, constants={"w": positive(N, N), "b": positive(N, seed=3)}),
    "attention": Row(
        "y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)",
        2 * (2 * HALF**2),
        {n: (1, 3, N) for n in "qkv"},
        (1, 3, N),
        blocks=(HALF, HALF),
    ),
    "attention with shared heads": Row(
        "y = Attention<q_num_heads=2, kv_num_heads=1>(q, k, v)",
        2 * HALF**2,
        {"q": (1, 3, N), "k": (1, 3, HALF), "v": (1, 3, HALF)},
        (1, 3, N),
    ),
    "rotary half split": Row(
        "y = RotaryEmbedding<num_heads=1>(x, c, s, p)",
        N,
        {"x": (1, 3, N)},
        (1, 3, N),
        rotary_tables(3, (1.0, 0.3)),
        fixed=("c", "s"),
    ),
    "rotary interleaved": Row(
        "y = RotaryEmbedding<num_heads=1, interleaved=1>(x, c, s, p)",
        N,
        {"x": (1, 3, N)},
        (1, 3, N),
        rotary_tables(3, (1.0, 0.3)),
        fixed=("c", "s"),
    ),
    "rotary on a part": Row(
        "y = RotaryEmbedding<num_heads=1, rotary_embedding_dim=2>(x, c, s, p)",
        2 + (N - 2) ** 2,
        {"x": (1, 3, N)},
        (1, 3, N),
        rotary_tables(3, (1.0,)),
        fixed=("c", "s"),
    ),
    # convolutions, channels first inside, channels last outside
    "convolution": Row(
        f"{LAST_TO_FIRST} c = Conv(u, w, b) {FIRST_TO_LAST}",
        2 * N * N,
        **CONV,
        constants={**MOVES, "w": positive(N, N, 1), "b": positive(N, seed=4)},
    ),
    "depthwise convolution": Row(
        f"{LAST_TO_FIRST} c = Conv<pads=[1,1], group=4>(u, w) {FIRST_TO_LAST}",
        2 * N,
        **CONV,
        constants={**MOVES, "w": positive(N, 1, 3)},
    ),
    "grouped convolution": Row(
        f"{LAST_TO_FIRST} c = Conv<pads=[1,1], group=2>(u, w) {FIRST_TO_LAST}",
        4 * HALF**2,
        **CONV,
        constants={**MOVES, "w": positive(N, HALF, 3)},
        blocks=(HALF, HALF),
    ),
    "transposed convolution": Row(
        f"{LAST_TO_FIRST} c = ConvTranspose(u, w) {FIRST_TO_LAST}",
        2 * N * N,
        **CONV,
        constants={**MOVES, "w": positive(N, N, 1)},
    ),
    "max pool": Row(
        f"{LAST_TO_FIRST} c = MaxPool<kernel_shape=[3], pads=[1,1]>(u) {FIRST_TO_LAST}", N, **CONV, constants=MOVES
    ),
    "average pool": Row(
        f"{LAST_TO_FIRST} c = AveragePool<kernel_shape=[3], pads=[1,1]>(u) {FIRST_TO_LAST}",
        N * N,
        **CONV,
        constants=MOVES,
    ),
    "group norm": Row(
        f"{LAST_TO_FIRST} c = GroupNormalization<num_groups=2, epsilon=0.3>(u, g, b) {FIRST_TO_LAST}",
        2 + N,
        **CONV,
        constants={**MOVES, "g": positive(N), "b": positive(N, seed=2)},
        epsilon=2,
        blocks=(HALF, HALF),
    ),
    "instance norm": Row(
        f"{LAST_TO_FIRST} c = InstanceNormalization<epsilon=0.3>(u, g, b) {FIRST_TO_LAST}",
        N + N,
        **CONV,
        constants={**MOVES, "g": positive(N), "b": positive(N, seed=2)},
        epsilon=N,
    ),
    "einsum": Row('y = Einsum<equation="sk,kj->sj">(x, w)', 2 * N * N, constants={"w": positive(N, N)}),
}

# Functions of single channels, by the law of their rule. The ones that need a domain get it from another function.
ODD = ["Erf", "Asinh", "Atan", "Sin", "Sinh", "Tan"]
NONLINEAR = ["Swish", "HardSwish", "Mish", "Silu", "Softplus", "Softsign", "Exp", "Cos", "Cosh", "Elu"]
NONLINEAR += ["Celu", "Selu", "Erfc"]
INSIDE = {
    "Asin": "Tanh(x)",
    "Atanh": "Softsign(x)",
    "Acos": "Tanh(x)",
    "Acosh": "Cosh(x)",
    "Log": "Cosh(x)",
    "Sqrt": "Abs(x)",
}
ROWS |= {op: Row(f"y = {op}(x)", 0) for op in ODD + NONLINEAR}
ROWS |= {op: Row(f"t = {inner} y = {op}(t)", 0) for op, inner in INSIDE.items()}
# sqrt|d x| = sqrt(d) sqrt|x| and arcosh cosh x = |x|: scales that the analysis leaves out.
ROWS["Sqrt"].ignored = ROWS["Acosh"].ignored = N
ROWS |= {op: Row(f"y = {op}(x)", N * N) for op in ("Identity", "Dropout", "Flatten")}
ROWS |= {op: Row(f"y = {op}(a, b)", N * N, TWO) for op in ("Sub", "Sum", "Mean")}
BOOLS = {"m": ints(1, 0, 1).reshape(3, 1)}
COPIES = {"one": ints(1), "twice": ints(3, 2, N), "flat": ints(3, 2 * N)}
SQUARE = {"inputs": {"x": (4, N)}, "constants": {"s": ints(1, N, 2, 2), "flat": ints(1, 4 * N)}}
ROWS |= {
    "cast": Row("t = Cast<to=11>(x) y = Cast<to=1>(t)", N * N),
    "cast like": Row("y = CastLike(x, k)", N * N, constants={"k": np.array(1.0, np.float32)}),
    "hard sigmoid": Row("y = HardSigmoid<alpha=2.0>(x)", 0),
    "shrink": Row("y = Shrink<bias=0.3>(x)", 0),
    "reciprocal": Row("y = Reciprocal(x)", N),
    "min of two": Row("y = Min(a, b)", N, TWO),
    "bounds per channel": Row("t = Max(x, lo) y = Min(t, hi)", N, constants={"lo": -positive(N), "hi": positive(N)}),
    "log softmax": Row("y = LogSoftmax(x)", 0, ignored=N),
    "choice per position": Row("c = Cast<to=9>(m) y = Where(c, a, b)", N * N, TWO, constants=BOOLS),
    "choice per channel": Row(
        "c = Cast<to=9>(m) y = Where(c, a, b)",
        N,
        TWO,
        constants={"m": ints(1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0).reshape(3, N)},
    ),
    "comparison": Row("g = Greater(a, b) c = Cast<to=1>(g) y = Mul(a, c)", 0, TWO, ignored=N + N * N),
    # copies: one matrix for all, and whatever kills copies among themselves is no transformation of the space
    "expand": Row(
        "u = Unsqueeze(x, one) e = Expand(u, twice) y = Reshape(e, flat)",
        N * N,
        output=(3, 2 * N),
        constants=COPIES,
        ignored=2 * N * N,
    ),
    "tile": Row("y = Tile(x, r)", N * N, output=(3, 2 * N), constants={"r": ints(1, 2)}, ignored=2 * N * N),
    "space to depth": Row(
        "t = Transpose(x) i = Reshape(t, s) d = SpaceToDepth<blocksize=2>(i) y = Reshape(d, flat)",
        N * N,
        output=(1, 4 * N),
        **SQUARE,
    ),
    "depth to space": Row(
        "t = Transpose(x) i = Reshape(t, s) d = DepthToSpace<blocksize=2>(i) f = Squeeze(d, zero) y = Reshape(f, flat)",
        0,
        output=(64, 1),
        **{**SQUARE, "constants": {"s": ints(1, N, 2, 2), "zero": ints(0), "flat": ints(16, 1)}},
        ignored=1,
    ),
    # positions
    "running sum": Row("y = CumSum(x, k)", N * N, constants={"k": np.array(0, np.int64)}),
    "padding with zeros": Row("y = Pad(x, p)", N * N, output=(5, N), constants={"p": ints(1, 0, 1, 0)}),
    "padding with a number": Row(
        "y = Pad(x, p, number)",
        0,
        output=(5, N),
        constants={"p": ints(1, 0, 1, 0), "number": np.array(0.7, np.float32)},
        ignored=N * (N - 1),
    ),
    "global average": Row(
        f"{LAST_TO_FIRST} g = GlobalAveragePool(u) c = Add(u, g) {FIRST_TO_LAST}", N * N, **CONV, constants=MOVES
    ),
    "global maximum": Row(
        f"{LAST_TO_FIRST} g = GlobalMaxPool(u) c = Add(u, g) {FIRST_TO_LAST}", N, **CONV, constants=MOVES
    ),
    "batch norm": Row(
        f"{LAST_TO_FIRST} c = BatchNormalization(u, g, b, m, var) {FIRST_TO_LAST}",
        N * N + N,
        **CONV,
        constants={**MOVES, **{k: positive(N, seed=i) for i, k in enumerate(("g", "b", "m", "var"))}},
    ),
    # rows picked by an index
    "embedding": Row(
        "i = ArgMax<axis=1, keepdims=0>(x) y = Gather(table, i)",
        N * N,
        constants={"table": positive(N, N)},
        ignored=N * N,
    ),
    "gather of positions": Row("y = GatherND(x, i)", N * N, constants={"i": ints(2, 0, 2).reshape(3, 1)}),
    "gather of elements": Row(
        "y = GatherElements<axis=0>(x, i)",
        0,
        constants={"i": ints(0, 1, 2, 0, 1, 2, 0, 2, 2, 0, 1, 1).reshape(3, N)},
        ignored=N,
    ),
    "scatter of positions": Row(
        "y = ScatterND(a, i, b)", N * N, {"a": (3, N), "b": (1, N)}, constants={"i": ints(1).reshape(1, 1)}
    ),
    "scatter of whole rows": Row(
        "y = ScatterElements<axis=0>(a, i, b)",
        N * N,
        {"a": (3, N), "b": (1, N)},
        constants={"i": ints(1, 1, 1, 1).reshape(1, N)},
    ),
    "scatter of elements": Row(
        "y = ScatterElements<axis=0>(a, i, b)",
        N,
        {"a": (4, N), "b": (1, N)},
        (4, N),
        {"i": ints(0, 1, 2, 3).reshape(1, N)},
    ),
    "largest": Row("y, i = TopK(x, k)", 0, output=(3, HALF), constants={"k": ints(HALF)}, ignored=1),
}
REDUCTIONS = {"ReduceSum": N * N, "ReduceMax": N, "ReduceMin": N, "ReduceL1": 0, "ReduceL2": 0, "ReduceProd": 0}
REDUCTIONS |= {"ReduceSumSquare": 0, "ReduceLogSumExp": 0}
ROWS |= {
    op: Row(f"m = {op}<keepdims=1>(x, ax) y = Add(x, m)", dimension, constants={"ax": ints(0)})
    for op, dimension in REDUCTIONS.items()
}
# Norms are homogeneous; the analysis admits permutations only.
ROWS["ReduceL1"].ignored = ROWS["ReduceL2"].ignored = N
ROWS["ReduceLogSum"] = Row("a = Exp(x) m = ReduceLogSum<keepdims=1>(a, ax) y = Add(x, m)", 0, constants={"ax": ints(0)})

WITHOUT = {
    "piecewise constant or jumping, which a derivative does not see": [
        *("Sign", "Round", "Floor", "Ceil", "Hardmax", "ThresholdedRelu"),
    ],
    "values are indices or truth values": [
        *("ArgMin", "NonZero", "OneHot", "Unique", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "IsNaN", "IsInf"),
        *("And", "Or", "Not", "Xor", "Shape", "Size"),
    ],
    "an older or a vendor's spelling of an operator above, with the same rule": [
        *("Scatter", "Upsample", "MRotaryEmbedding", "SimplifiedLayerNormalization"),
    ],
    "integers, which a derivative does not see (`test_quantized.py`)": ["DequantizeLinear", "QuantizeLinear"],
    "interpolates or pools positions as the average or maximum above; not executed in float64": ["Resize", "LpPool"],
}
"""Operators with a rule and without a row, by reason."""
