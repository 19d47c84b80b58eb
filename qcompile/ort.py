"""Run an IR model in ONNX Runtime, with the settings under which it computes what the model says.

Two defaults of ONNX Runtime change numbers: a DequantizeLinear of a constant weight before a MatMul is fused into
MatMulNBits, which quantizes the activation once more (0.5 % error per layer), and quantized pairs are fused into u8 x
s8 products that saturate on processors without VNNI. `EXACT` switches both off.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError

EXACT = {"session.qdq_matmulnbits_accuracy_level": "0", "session.disable_quant_qdq": "1"}
_INLINE_LIMIT = 1 << 30  # a protobuf message ends at 2 GiB; stay well below


def session(
    model: ir.Model | str | os.PathLike[str],
    *,
    outputs: Sequence[str] = (),
    threads: int = 0,
    settings: Mapping[str, str] | None = None,
    optimize: bool = True,
    fold: bool = True,
) -> Any:
    """Create an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: IR model or path of an ONNX file.
        outputs: names of further values to return after the model's own outputs (IR models only).
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        settings: session configuration entries; `EXACT` if None.
        optimize: False runs the graph node by node.
        fold: False leaves constant expressions, such as packed weights, to every run.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (EXACT if settings is None else settings).items():
        options.add_session_config_entry(key, value)
    how = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": [] if fold else ["ConstantFolding"]}
    try:
        if not isinstance(model, ir.Model):
            return ort.InferenceSession(os.fspath(model), options, **how)
        if outputs:
            model = with_outputs(model, outputs)
        if weight_bytes(model) < _INLINE_LIMIT:
            return ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, **how)
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            return ort.InferenceSession(str(path), options, **how)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"ONNX Runtime refuses the model: {str(error).strip().splitlines()[0]}") from error


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` (weights shared) that also returns the named values."""
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    values |= {v.name: v for v in copy.graph.inputs}
    present = {v.name for v in copy.graph.outputs}
    for name in names:
        if name in present:
            continue
        if name not in values:
            raise ModelError(f"the model has no value named {name!r}")
        value = values[name]
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        copy.graph.outputs.append(value)
        present.add(name)
    return copy


def run(
    model: ir.Model | Any, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Run once and return every output by name; ``model`` is an IR model or a session."""
    ready = session(model, outputs=outputs or ()) if isinstance(model, ir.Model) else model
    names = [o.name for o in ready.get_outputs()]
    wanted = {i.name for i in ready.get_inputs()}
    return dict(zip(names, ready.run(names, {k: v for k, v in feeds.items() if k in wanted})))
