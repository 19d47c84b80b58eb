"""How large a unit will be, before synthesis: look-up tables, flip-flops, multipliers, memory bits."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.verilog.netlist import Unit


@dataclass(frozen=True)
class Area:
    """An estimate."""

    luts: float = 0.0
    flipflops: float = 0.0
    multipliers: float = 0.0
    memory_bits: float = 0.0

    def __add__(self, other: Area) -> Area:
        return Area(
            self.luts + other.luts,
            self.flipflops + other.flipflops,
            self.multipliers + other.multipliers,
            self.memory_bits + other.memory_bits,
        )


def estimate(unit: Unit) -> Area:
    """The area of one unit."""
    if hasattr(unit, "flow"):
        return Area(**unit.area())
    p = unit.parameters
    width = sum(c.width for c in unit.outputs.values())
    luts = 20.0 + 2.0 * width
    flipflops = 30.0 + 2.0 * width
    multipliers = 0.0
    memory = float(sum(m.words.size * m.bits for m in unit.memories.values()))
    if unit.module in ("matvec", "matmul"):
        products = p["PE"] * p.get("SIMD", 1)
        digits = (p["W_BITS"] + 1) // 2
        if p["STYLE"] == 0:
            multipliers += products
        else:
            luts += products * digits * (p["X_BITS"] + 3)
        luts += p["PE"] * ((p.get("SIMD", 1) - 1) * (p["P_BITS"] + 2) + p["A_BITS"] + 30)
        multipliers += p["PE"] * p["MULTIPLY"]
    return Area(luts, flipflops, multipliers, memory)
