"""What is executed on a GPU: formats x shapes, each over many numbers of rows. Shared by tests and by the script that
prepares sources on a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.kernels import Plan, plan


@dataclass(frozen=True)
class Case:
    """One layer."""

    weight: str
    k: int
    n: int
    activation: str = "none"
    dtype: str = "float16"
    bias: bool = False
    split: int = 0

    def plan(self, target: str = "sm_90a") -> Plan:
        """Its kernels; ``split`` forces the number of blocks along K."""
        forced = {rows: {"split": self.split} for rows in (8, 16, 32, 64)} if self.split else None
        return plan(
            self.k, self.n, self.weight, self.activation, getattr(torch, self.dtype), target, self.bias, configs=forced
        )


CASES = [
    Case("int4/g128", 512, 256),
    Case("int4/g128", 1031, 259, bias=True),
    Case("int4/g128", 2048, 320, split=3),
    Case("int4/g128", 1536, 512, dtype="bfloat16", bias=True),
    Case("int4/g32/asym", 515, 77, split=2),
    Case("int4/g64/asym", 640, 96, dtype="bfloat16"),
    Case("int4", 777, 131),
    Case("int4/asym", 384, 200, bias=True),
    Case("int2/g128", 1100, 160, split=2),
    Case("int2/g32/asym", 300, 48, dtype="bfloat16"),
    Case("int3/g64", 530, 133),
    Case("int3/g128/asym", 768, 128, dtype="bfloat16", split=2),
    Case("int8/g128", 512, 72, bias=True),
    Case("int8/asym", 333, 65),
    Case("int8/g64/asym", 700, 80, dtype="bfloat16"),
    Case("int8", 1031, 259, "int8", bias=True),
    Case("int8", 2048, 512, "int8", split=2),
    Case("int4", 777, 131, "int8", dtype="bfloat16"),
    Case("int4/g128", 1536, 200, "int8", split=3),
    Case("int2/g64", 512, 96, "int8"),
]
"""Odd and even extents, all bits, groups, both kinds of zero points, both float types, with and without split-k."""

ROWS = [*range(1, 34), 64, 100, 128, 257, 4096]
"""Numbers of rows every case is executed with."""
