"""Does the captured graph compute what the original computes? ONNX Runtime against torch on two sets of inputs.

The figure is ``max |onnx - torch| / max |torch|`` over all outputs; float32 reorderings give about 1e-6, a wrong
graph gives 1e-2 and more, so the limit of 1e-3 separates the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import ort
from qcompile.errors import ModelError

TOLERANCE = 1e-3


def check_parity(
    model: ir.Model,
    reference: Callable[..., Any],
    examples: Sequence[tuple[Any, ...]],
    name: str,
    valid: int | None = None,
) -> dict[str, Any]:
    """Compare on every example (tuples of torch tensors, nested lists allowed); return what was measured.

    Args:
        model: the exported graph.
        reference: what computes the right outputs.
        examples: inputs for both.
        name: what to call the model in messages.
        valid: which input is a mask (batch, sequence) of the positions that count. At padded positions every key can be
            masked, and what a softmax over nothing gives is not defined.

    Raises:
        ModelError: the outputs differ by more than ``TOLERANCE``, or in number or shape, or the graph does not run.
    """
    import torch

    feeds = []
    for example in examples:
        arrays = [tensor.detach().cpu().numpy() for tensor in flatten(example)]
        feeds.append(dict(zip((v.name or "" for v in model.graph.inputs), arrays)))
    try:
        session = ort.session(model)
        results = [session.run(None, feed) for feed in feeds]
        del session
    except Exception as error:
        raise ModelError(
            f"{name}: ONNX Runtime does not run the exported graph: {' '.join(str(error).split())[:300]}"
        ) from error
    absolute = relative = 0.0
    for feed, example, got in zip(feeds, examples, results):
        with torch.no_grad():
            wanted = [t.detach().cpu().numpy() for t in flatten(reference(*example))]
        shapes = {key: tuple(value.shape) for key, value in feed.items()}
        if [g.shape for g in got] != [w.shape for w in wanted]:
            raise ModelError(
                f"{name}: for inputs {shapes} the exported graph gives outputs {[g.shape for g in got]},"
                f" torch gives {[w.shape for w in wanted]}"
            )
        for index, (g, w) in enumerate(zip(got, wanted)):
            if valid is not None and w.shape[:2] == (mask := list(feed.values())[valid]).shape:
                g, w = g[mask != 0], w[mask != 0]
            if not w.size:
                continue
            gap = float(np.abs(g.astype(np.float64) - w.astype(np.float64)).max())
            scale = float(np.abs(w.astype(np.float64)).max()) or 1.0
            if not gap <= TOLERANCE * scale:
                output = model.graph.outputs[index].name
                raise ModelError(
                    f"{name}: the exported graph differs from torch by {gap / scale:.2g} of the largest value"
                    f" in output '{output}' for inputs {shapes}; capture with check=False to look at it"
                )
            absolute, relative = max(absolute, gap), max(relative, gap / scale)
    return {"examples": len(results), "max_abs_error": absolute, "max_rel_error": relative}


def flatten(value: Any) -> list[Any]:
    """The tensors of a nested structure (tuples, lists, dicts, dataclass-like model outputs), in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in flatten(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in flatten(item)]
    return []
