"""One layer of a mixture of experts, int4 in groups of 32, a token at a time and a prompt, beside ONNX Runtime.

    python benchmarks/experts.py                     hidden 1024, 8 experts, 2 of them for each token, intermediate 3584
    python benchmarks/experts.py --rows 1 64 --threads 2

`ours` is the compiled program (router, experts, sum), activations quantized to 8 bits for each token. Peers, with the same codes and
scales and float activations: ``QMoE``, ONNX Runtime's operator for such layers; ``GatherBlockQuantized``, which picks codes and makes
floats of them, before a batched MatMul; and ``model.onnx`` of the artifact, which has our packed bytes. Every call has other tokens,
so that other experts are picked. Contenders take turns in five blocks; a figure is the lowest of the five medians, in microseconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import runtime
from qcompile.errors import ArtifactError
from qcompile.formats import Quantized, parse_format
from qcompile.recipes import Recipe

GROUP, TURNS, BLOCKS = 32, 24, 5


def layer(
    hidden: int, inner: int, experts: int, top: int, seed: int = 0
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A float layer as torch exports it: y = sum_j p_j (swish(x G_j) * (x U_j)) D_j over the experts j with the largest p."""
    rng = np.random.default_rng(seed)
    weights = {
        "router": rng.standard_normal((hidden, experts)) / hidden**0.5,
        "up": rng.standard_normal((experts, hidden, 2 * inner)) / hidden**0.5,
        "down": rng.standard_normal((experts, inner, hidden)) / inner**0.5,
    }
    floats = {name: array.astype(np.float32) for name, array in weights.items()}
    integers = {"k": [top], "flat": [-1], "one": [1], "each": [1, top, 1], "wide": [-1, hidden], "pairs": [-1, top, hidden],
                "column": [-1, 1]}  # fmt: skip
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    experts (float[tokens, {hidden}] x) => (float[tokens, {hidden}] y) {{
        logits = MatMul (x, router)
        p = Softmax <axis=-1> (logits)
        best, picked = TopK <axis=-1> (p, k)
        total = ReduceSum <keepdims=1> (best, one)
        shares = Div (best, total)
        ids = Reshape (picked, flat)
        x1 = Unsqueeze (x, one)
        x2 = Expand (x1, each)
        x3 = Reshape (x2, wide)
        row = Unsqueeze (x3, one)
        w1 = Gather <axis=0> (up, ids)
        h1 = MatMul (row, w1)
        h = Squeeze (h1, one)
        g, u = Split <axis=-1, num_outputs=2> (h)
        s0 = Sigmoid (g)
        s = Mul (g, s0)
        a = Mul (s, u)
        a1 = Unsqueeze (a, one)
        w2 = Gather <axis=0> (down, ids)
        o1 = MatMul (a1, w2)
        o = Squeeze (o1, one)
        share = Reshape (shares, column)
        weighted = Mul (o, share)
        parts = Reshape (weighted, pairs)
        y = ReduceSum <keepdims=0> (parts, one)
    }}"""
    model = onnx.parser.parse_model(text)
    arrays = floats | {name: np.array(v, np.int64) for name, v in integers.items()}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    return model, floats


def blocks(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (E, N, K) and scales (E, N, K / 32) of the int4 form of (E, K, N)."""
    fmt = parse_format(f"int4/g{GROUP}")
    parts: list[Quantized] = [fmt.encode(matrix) for matrix in stack]
    return np.stack([p.codes.T for p in parts]), np.stack([p.scale.T for p in parts]).astype(np.float32)


def packed(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, plus 8, the first in the low half."""
    wide = (codes.astype(np.int16) + 8).astype(np.uint8)
    return wide[..., ::2] | wide[..., 1::2] << 4


def session(nodes: list, inits: dict[str, onnx.TensorProto], hidden: int, threads: int) -> onnxruntime.InferenceSession:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", hidden]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "peer", value[:1], value[1:], list(inits.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def qmoe(weights: dict[str, np.ndarray], top: int, threads: int) -> onnxruntime.InferenceSession:
    """The layer as one com.microsoft.QMoE."""
    hidden = weights["router"].shape[0]
    inits = {"router": numpy_helper.from_array(weights["router"], "router")}
    for name in ("up", "down"):
        codes, scale = blocks(weights[name])
        if name == "up":  # gate and up in turn, as the operator wants them
            order = np.arange(codes.shape[1]).reshape(2, -1).T.reshape(-1)
            codes, scale = codes[:, order], scale[:, order]
        inits |= {n: numpy_helper.from_array(a, n) for n, a in ((name, packed(codes)), (f"{name}.scale", scale))}
    inputs = ["x", "logits", "up", "up.scale", "", "down", "down.scale", ""]
    moe = helper.make_node(
        "QMoE", inputs, ["y"], domain="com.microsoft", k=top, expert_weight_bits=4, block_size=GROUP, swiglu_fusion=1,
        activation_type="swiglu", activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1,
    )  # fmt: skip
    return session([helper.make_node("MatMul", ["x", "router"], ["logits"]), moe], inits, hidden, threads)


def gathered(model: onnx.ModelProto, weights: dict[str, np.ndarray], threads: int) -> onnxruntime.InferenceSession:
    """The float graph with GatherBlockQuantized of (E, N, K) in place of Gather."""
    hidden = weights["router"].shape[0]
    inits = {i.name: i for i in model.graph.initializer if i.name not in ("up", "down")}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gather":
            nodes.append(node)
            continue
        name, ids = node.input
        codes, scale = blocks(weights[name])
        raw = helper.make_tensor(name, TensorProto.INT4, codes.shape, (packed(codes) ^ 0x88).tobytes(), raw=True)
        inits |= {name: raw, f"{name}.scale": numpy_helper.from_array(scale, f"{name}.scale")}
        turned = f"{node.output[0]}.rows"
        inputs = [name, ids, f"{name}.scale"]
        nodes.append(
            helper.make_node(
                "GatherBlockQuantized", inputs, [turned], domain="com.microsoft", block_size=GROUP, quantize_axis=2
            )
        )
        nodes.append(helper.make_node("Transpose", [turned], list(node.output), perm=[0, 2, 1]))
    return session(nodes, inits, hidden, threads)


def measure(
    contenders: dict[str, Callable[[np.ndarray], None]], tokens: list[np.ndarray], turns: int
) -> dict[str, float]:
    """Microseconds for a call, the lowest of the medians of all blocks."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(BLOCKS):
        for name, call in contenders.items():
            call(tokens[0])
            times = []
            for i in range(turns):
                start = time.perf_counter()
                call(tokens[i % len(tokens)])
                times.append(time.perf_counter() - start)
            best[name] = min(best[name], 1e6 * float(np.median(times)))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("inner", 3584), ("experts", 8), ("top", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="of the peers")
    parser.add_argument("--artifact", help="keep the compiled layer there, or take it from there")
    options = parser.parse_args()
    model, weights = layer(options.hidden, options.inner, options.experts, options.top)
    folder = options.artifact or tempfile.mkdtemp()
    try:
        ours = qcompile.load(folder)
    except ArtifactError:
        recipe = Recipe("experts", weight=f"int4/g{GROUP}", activation="int8/token")
        ours = qcompile.compile(model, recipe=recipe, output=folder, overwrite=True, progress=False, prove=False)
    runtime.set_threads(options.threads)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
    emitted = onnxruntime.InferenceSession(str(ours.onnx_path), settings, ["CPUExecutionProvider"])
    sessions = {
        "QMoE": qmoe(weights, options.top, options.threads),
        "GatherBlockQuantized": gathered(model, weights, options.threads),
        "model.onnx": emitted,
    }
    sessions = {name: s for name, s in sessions.items() if options.only is None or name in options.only}
    rng = np.random.default_rng(1)
    exact = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    print("layer:", {layer.name: (layer.kernel, round(layer.bits_per_weight, 2)) for layer in ours.report.layers})
    for rows in options.rows:
        tokens = [rng.standard_normal((rows, options.hidden)).astype(np.float32) for _ in range(12)]
        wanted = exact.run(None, {"x": tokens[0]})[0]
        calls: dict[str, Callable[[np.ndarray], object]] = {"ours": lambda x: ours(x)}
        calls |= {name: (lambda x, s=s: s.run(None, {"x": x})[0]) for name, s in sessions.items()}
        if rows > 8:
            calls.pop("GatherBlockQuantized", None)
            calls.pop("model.onnx", None)
        errors = {}
        for name, call in calls.items():
            got = np.asarray(call(tokens[0]))
            errors[name] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        best = measure(calls, tokens, TURNS if rows < 8 else 4)
        for name, value in best.items():
            ratio = value / best["ours"]
            print(
                f"{rows} rows, {options.threads} threads: {name} {value:.0f} us ({ratio:.2f}x), error {100 * errors[name]:.1f} %"
            )


if __name__ == "__main__":
    main()
