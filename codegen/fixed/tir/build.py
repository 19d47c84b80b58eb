"""From a node to scheduled TIR, and to a function that runs through LLVM (the second oracle).

    prim_func(node)   parameters: inputs (tokens, channels), constants in order, output (tokens, channels)
    scheduled(node)   its loops folded by `Node.folding` and marked: ``hls.pipeline``, ``hls.unroll``
    lower(node)       the same as plain loops, ready to be printed
    compile(node)     a callable from frames to frames

For its class of nodes a module registers `compute`, an expression of tensors, and, if it can be folded, `schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, te, tirx

from qcompile.codegen.fixed.nodes.base import Node
from qcompile.formats.fixed import IntType

PASSES = (
    s_tir.transform.LowerInitBlock,
    s_tir.transform.PlanAndUpdateBufferAllocationLocation,
    s_tir.transform.ConvertBlocksToOpaque,
    s_tir.transform.CompactBufferAllocation,
    s_tir.transform.LowerOpaqueBlock,
    tirx.transform.StmtSimplify,
    tirx.transform.CommonSubexprElim,
)

OUTPUT = "y"


@singledispatch
def compute(node: Node, inputs: Sequence[te.Tensor], constants: Mapping[str, te.Tensor]) -> te.Tensor:
    """The output of ``node`` (named `OUTPUT`) as a tensor expression of its inputs and constants."""
    raise NotImplementedError(type(node))


@singledispatch
def schedule(node: Node, sch: s_tir.Schedule) -> None:
    """Fold the blocks of ``main``; a block has the name of its tensor."""


def prim_func(node: Node) -> Any:
    """The function of ``node`` in TIR blocks, not scheduled."""
    inputs = [te.placeholder(s.shape, s.type.dtype, n) for n, s in zip(input_names(node), node.inputs)]
    constants = {
        name: te.placeholder(array.shape, constant_type(array).dtype, name) for name, array in node.constants.items()
    }
    return te.create_prim_func([*inputs, *constants.values(), compute(node, inputs, constants)])


def input_names(node: Node) -> list[str]:
    """Names of the input parameters."""
    return ["x"] if len(node.inputs) == 1 else [f"x{i}" for i in range(len(node.inputs))]


def scheduled(node: Node) -> Any:
    """The `s_tir.Schedule` of ``node`` after folding."""
    sch = s_tir.Schedule(tvm.IRModule({"main": prim_func(node)}))
    sch.work_on("main")
    schedule(node, sch)
    return sch


def lower(node: Node) -> Any:
    """The scheduled PrimFunc as loops, buffers and stores."""
    module = scheduled(node).mod
    for make in PASSES:
        module = make()(module)
    return module["main"]


def compile(node: Node, *, folded: bool = True) -> Callable[..., np.ndarray]:
    """Compile one node with LLVM; the result maps frames ``(V, tokens, channels)`` to frames, int64."""
    module = scheduled(node).mod if folded else tvm.IRModule({"main": prim_func(node)})
    main = tvm.compile(module, target="llvm")["main"]
    constants = [tvm.runtime.tensor(array.astype(constant_type(array).dtype)) for array in node.constants.values()]

    def run(*inputs: np.ndarray) -> np.ndarray:
        result = np.empty((len(inputs[0]), *node.output.shape), np.int64)
        out = tvm.runtime.tensor(np.zeros(node.output.shape, node.output.type.dtype))
        for i, frames in enumerate(zip(*inputs)):
            given = [tvm.runtime.tensor(f.astype(s.type.dtype)) for f, s in zip(frames, node.inputs)]
            main(*given, *constants, out)
            result[i] = out.numpy()
        return result

    return run


def constant_type(array: np.ndarray) -> IntType:
    """The narrowest type of an array of constants."""
    return IntType.covering(int(array.min()), int(array.max()))
