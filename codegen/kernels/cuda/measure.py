"""Time kernels on torch's current CUDA device.

Every figure is the median over replays of a CUDA graph that calls one kernel on many copies of the weights in turn,
together larger than the second-level cache, divided by the number of calls. Weights are random bits: values do not matter
for time, the tests check results.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.codegen.kernels.cuda.layout import table_words
from qcompile.codegen.kernels.cuda.plan import Plan, family
from qcompile.codegen.kernels.cuda.planes import PlaneShape

CACHE = 256 << 20
"""Copies of the weights add up to at least this many bytes."""

LEAST = 20
"""Calls in a graph, at least."""


def append(path: Path | None, row: Mapping[str, Any]) -> None:
    """Add a line of JSON to the file at ``path``, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)


def random_arrays(plan: Plan) -> list[torch.Tensor]:
    """Packed arrays of the right sizes with random codes."""
    s, n = plan.shape(), plan.problem.n

    def codes(size: int) -> torch.Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")

    column = torch.rand(n, device="cuda") * 0.01
    if isinstance(s, PlaneShape):
        zero = torch.zeros(n, dtype=torch.int32, device="cuda")
        return [codes(s.tiles * s.blocks * s.block_bytes), zero, zero, column]
    arrays = [codes(s.tiles * s.blocks * plane.block_bytes) for plane in s.layout.planes]
    if s.meta_bytes:
        size = s.tiles * s.meta_groups * 8 * s.meta_bytes
        arrays.append(torch.rand(size // 2, device="cuda").half().view(torch.uint8))
    if s.levels:
        words = table_words(np.linspace(-1, 1, 16), s.dtype)
        arrays.append(torch.from_numpy(words.view(np.int32)).cuda().view(torch.uint32))
    return [*arrays, column]


def weight_sets(plan: Plan) -> tuple[list[list[torch.Tensor]], int]:
    """Copies of the packed arrays that leave the cache, and the bytes of one."""
    first = random_arrays(plan)
    size = sum(a.numel() * a.element_size() for a in first)
    return [first] + [[a.clone() for a in first] for _ in range(-(-CACHE // size))], size


def calls(plan: Plan, index: int, m: int, sets: list[list[torch.Tensor]], function: Any) -> list[Callable[[], Any]]:
    """Closures that run kernel ``index`` of the plan on ``m`` rows, each on its own weights."""
    entry = plan.entries[index]
    s = plan.shape(index)
    if s.integer:
        top = (1 << plan.problem.activation.bits - 1) - 1
        x = [torch.randint(-top, top + 1, (m, s.x_width), dtype=torch.int8, device="cuda")]
    else:
        x = [torch.randn(m, s.x_width, device="cuda").to(getattr(torch, s.dtype))]
    if s.narrow:
        x.append(torch.rand(m, device="cuda"))
    elements, counters = family(entry.family).scratch(plan.problem, entry.config, m)
    partial = torch.empty(elements, device="cuda")
    arrived = torch.zeros(counters, dtype=torch.int32, device="cuda")
    out = torch.empty(m, plan.problem.n, device="cuda", dtype=getattr(torch, s.out))
    return [functools.partial(function, *x, *w, partial, arrived, out) for w in sets]


def measure(functions: Sequence[Callable[[], Any]], replays: int = 9) -> float:
    """Median seconds per call."""
    for f in functions[:2]:
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, LEAST // len(functions))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for f in functions:
                f()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[replays // 2] * 1e-3 / (rounds * len(functions))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy; not in a graph, whose copies are slower."""
    a = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(10)]
    b.copy_(a)
    for event in events:
        event.record()
        b.copy_(a)
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in pairwise(events))
    return 2 * a.numel() / (times[len(times) // 2] * 1e-3)
