"""Two small networks to learn on, built from operators, with outliers that a good transformation undoes."""

import exact
import numpy as np
import onnx_ir as ir
import oracle
import torch

from qcompile.passes.asks import Context, Data, Precision
from qcompile.passes.learn import Learned
from qcompile.passes.spaces import analyse

WIDTH, INNER, ROWS = 16, 24, 32


def residual(layers: int = 2, outputs: int = 40) -> ir.Model:
    """Gated layers on a residual stream with a few large channels, and a head that writes logits."""
    rng = np.random.default_rng(0)
    body, constants = "r0 = MatMul(x, we)", {"we": rng.standard_normal((WIDTH, WIDTH)) / 4}
    outliers = np.ones(WIDTH)
    outliers[[2, 7]] = 12
    for i in range(layers):
        body += (
            f" n{i} = RMSNormalization(r{i}, g{i}) a{i} = MatMul(n{i}, gate{i}) s{i} = Swish(a{i}) u{i} = MatMul(n{i}, up{i})"
            f" h{i} = Mul(s{i}, u{i}) d{i} = MatMul(h{i}, down{i}) r{i + 1} = Add(r{i}, d{i})"
        )
        for name, shape in ((f"gate{i}", (WIDTH, INNER)), (f"up{i}", (WIDTH, INNER)), (f"down{i}", (INNER, WIDTH))):
            constants[name] = rng.standard_normal(shape) / np.sqrt(shape[0])
        constants[f"down{i}"] = constants[f"down{i}"] * outliers
        constants[f"g{i}"] = 1 + 0.3 * rng.standard_normal(WIDTH)
    body += f" m = RMSNormalization(r{layers}, g) y = MatMul(m, head)"
    constants |= {"g": np.ones(WIDTH), "head": rng.standard_normal((WIDTH, outputs)) / 4}
    return oracle.parse(body, {"x": (ROWS, WIDTH)}, constants, (ROWS, outputs))


def normed(outputs: int = 12) -> ir.Model:
    """A LayerNorm with large offsets before a linear layer with a bias: shifts fold there."""
    rng = np.random.default_rng(1)
    constants = {
        "we": rng.standard_normal((WIDTH, WIDTH)) / 4,
        "g": 1 + 0.2 * rng.standard_normal(WIDTH),
        "b": np.where(np.arange(WIDTH) % 5 == 0, 6.0, 0.0) + 0.1 * rng.standard_normal(WIDTH),
        "w": rng.standard_normal((WIDTH, INNER)) / 4,
        "c": rng.standard_normal(INNER),
        "v": rng.standard_normal((INNER, outputs)) / 5,
    }
    body = (
        "e = MatMul(x, we) n = LayerNormalization(e, g, b) p = MatMul(n, w) a = Add(p, c) t = Tanh(a) y = MatMul(t, v)"
    )
    return oracle.parse(body, {"x": (ROWS, WIDTH)}, constants, (ROWS, outputs))


def feeds(model: ir.Model, count: int = 6) -> list[dict]:
    """Normal inputs."""
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal((ROWS, WIDTH)).astype(np.float32)} for _ in range(count)]


def context(model: ir.Model, samples: list[dict], weight: str = "int4", activation: str = "int4/token") -> Context:
    """A context in which every product but the first and the last is quantized."""
    spaces = analyse(model)
    names = {r.weight for readers in spaces.all_readers().values() for r in readers} - {"we", "head"}

    def rows(current: ir.Model, wanted, count: int = 0) -> dict:
        parts = [exact.Case(model, feed).rows(current, wanted) for feed in samples]
        return {n: np.concatenate([p[n] for p in parts]) for n in wanted}

    def measure(current: ir.Model, wanted, moments: bool) -> dict:
        return {n: exact.Statistics(x, moments) for n, x in rows(current, wanted).items()}

    return Context(spaces, Data(measure, samples, rows), {n: Precision.of(weight, activation) for n in names})


def program(ask: Learned, where: Context, dtype: torch.dtype = torch.float64):
    """The program of a method, with parameters in ``dtype``."""
    from qcompile.passes.learn.program import Program

    made = Program(where, torch.zeros((), dtype=dtype))
    ask.build(where, made, np.random.default_rng(0))
    return made
