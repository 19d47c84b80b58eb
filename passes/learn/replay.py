"""One training step of fixed shape as a CUDA graph.

A step over a small model is tens of thousands of short kernels, and launching them takes far longer than running them. A
graph is recorded once and launched as a whole. What it reads and writes stays at the same addresses: samples are copied
into its inputs, gradients are left where they were when it was recorded. Anything the host decides (shapes, small
integers) is fixed, so samples of other shapes run step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor
Feeds = Sequence[Mapping[str, Any]]


class Replay:
    """``gradients(feeds)``, recorded for the shapes of its first call; as it is where there is no GPU.

    Args:
        gradients: computes the loss of some samples and leaves its gradients with the parameters.
        parameters: of which gradients are taken.

    Attributes:
        refused: why nothing could be recorded.
    """

    def __init__(self, gradients: Callable[[Feeds], Tensor], parameters: Sequence[Tensor]) -> None:
        self.gradients, self.parameters = gradients, parameters
        self.graph: Any = None
        self.refused = ""

    def __call__(self, feeds: Feeds) -> Tensor:
        if not self.parameters or self.parameters[0].device.type != "cuda" or self.refused:
            return self.gradients(feeds)
        placed = [{k: _placed(v, self.parameters[0]) for k, v in feed.items()} for feed in feeds]
        if self.graph is None:
            try:
                self._record(placed)
            except RuntimeError as error:
                self.refused = f"steps cannot be recorded: {str(error).splitlines()[0]}"
                self._forget()
                return self.gradients(feeds)
        if _signature(placed) != self.signature:
            return self.gradients(feeds)
        for mine, theirs in zip(self.inputs, placed):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.graph.replay()
        return self.loss

    def _record(self, feeds: list[dict[str, Tensor]]) -> None:
        self.signature = _signature(feeds)
        self.inputs = [{k: t.clone() if t.device.type == "cuda" else t for k, t in feed.items()} for feed in feeds]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up, what depends on shapes alone is kept
                self._forget()
                self.gradients(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._forget()
        torch.cuda.empty_cache()  # a recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.gradients(self.inputs)
        self.graph = graph

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None


def _placed(value: Any, like: Tensor) -> Tensor:
    """A tensor on the device; integers that the host reads stay with it."""
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, order="C"))
    if tensor.is_floating_point():
        return tensor.to(like)
    return tensor if tensor.dim() < 2 and tensor.numel() <= 16 else tensor.to(like.device)


def _signature(feeds: Feeds) -> list[Any]:
    """Everything about samples that a recording depends on."""
    return [
        (i, name, tuple(t.shape), t.dtype, tuple(t.reshape(-1).tolist()) if t.device.type == "cpu" else ())
        for i, feed in enumerate(feeds)
        for name, t in sorted(feed.items())
    ]


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """Products of float32 matrices with 10-bit mantissas, which is far below what rounding to a few bits does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
