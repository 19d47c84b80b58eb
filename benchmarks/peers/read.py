"""Reading memory, and nothing else: the bound of a product with one row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T

from qcompile.codegen.kernels.cpu import vector as v
from qcompile.codegen.kernels.cpu.emission import Register
from qcompile.codegen.kernels.x86.instructions import prefetch
from qcompile.targets.target import Target

STEP = 256
"""Bytes per iteration."""


def reader(size: int, copies: int, threads: int, target: Target, streams: int = 1) -> Callable[[], None]:
    """A call that reads ``copies`` arrays of ``size`` bytes.

    From one end to the other, asking 2 KB ahead as our kernels do; or at several places in turn (``streams``), which some
    processors have faster, left to their own prefetchers.
    """
    pieces = max(threads, 1)
    rows = max(size // (pieces * streams * STEP), 1)
    shape = (pieces * streams, rows, STEP // 8)
    params = [v.Param("x", shape, "int64"), v.Param("out", (pieces, 4), "int64", output=True)]
    with v.kernel("read", params) as (builder, names):

        def piece(index: Any) -> None:
            sums = [Register("int64", 4) for _ in range(8)]
            for register in sums:
                register.set(v.const(0, 4, "int64"))
            with T.serial(rows) as row:
                for line in range(0, STEP // 8, 8) if streams == 1 else ():
                    prefetch(names["x"], [index, row, line + 256])
                for stream, (i, register) in itertools.product(range(streams), enumerate(sums)):
                    value = v.load(names["x"], [index * streams + stream, row, 4 * i], 4)
                    register.set(T.bitwise_xor(register.get(), value))
            total = sums[0].get()
            for register in sums[1:]:
                total = T.bitwise_xor(total, register.get())
            v.store(names["out"], [index, 0], total, 4)

        if pieces == 1:
            piece(T.int32(0))
        else:
            with T.parallel(pieces) as index:
                piece(index)
    read = tvm.compile(tvm.IRModule({"read": builder.get()}), target=target.tvm())["read"]
    arrays = [tvm.runtime.tensor(np.ones(shape, np.int64)) for _ in range(copies)]
    out = tvm.runtime.empty((pieces, 4), "int64")

    def call() -> None:
        for array in arrays:
            read(array, out)

    return call
