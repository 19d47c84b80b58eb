"""Every row of the rule table: the dimension of its group is the dimension of the numerical null space."""

from dataclasses import dataclass, field

import numpy as np
import oracle
import pytest

from qcompile.passes.spaces.rules import RULES

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


@pytest.mark.parametrize("name", sorted(ROWS))
def test_group_dimension_is_that_of_the_numerical_null_space(name):
    row = ROWS[name]
    model = oracle.parse(row.body, row.inputs, row.constants, row.output)
    assert oracle.numerical(model, blocks=row.blocks, fixed=row.fixed) - row.ignored + row.epsilon == row.dimension
    assert oracle.analysed(model)[1] == row.dimension


def test_every_rule_states_its_algebra():
    for (domain, op), rule in RULES.items():
        assert len(rule.algebra) > 20, f"{domain}::{op} does not say why"
