"""FPGA targets: devices, what they hold, and the synthesis flow that knows them.

Sources: Lattice, "ECP5 and ECP5-5G Family Data Sheet" (FPGA-DS-02012), table 1.1; AMD, "7 Series FPGAs Overview" (DS180),
tables 4 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.errors import TargetError
from qcompile.targets.target import Target

DEFAULT = "ecp5-85k"


@dataclass(frozen=True)
class FpgaTarget(Target):
    """A device.

    Attributes:
        family: of devices; names the folder of Verilog written for its blocks.
        lut_inputs: inputs of a look-up table.
        addends: numbers that one look-up table per bit adds.
        luts, flipflops, multipliers, memory_kbit: what there is.
        synthesis: the Yosys command for its family.
        place: nextpnr's option for the device; empty where no place and route is available.
    """

    family: str = ""
    lut_inputs: int = 4
    addends: int = 2
    luts: int = 0
    flipflops: int = 0
    multipliers: int = 0
    memory_kbit: int = 0
    synthesis: str = ""
    place: str = ""

    @property
    def hierarchical(self) -> str:
        """The synthesis command that keeps modules apart."""
        apart = self.synthesis.replace(" -flatten", "")
        return apart if apart != self.synthesis else f"{apart} -noflatten"

    def tvm(self) -> Any:
        """Fixed-point functions run on the host to be checked.

        Raises:
            TargetError: always; kernels are not generated for FPGAs.
        """
        raise TargetError(f"{self.cpu} runs hardware, not kernels")


def _ecp5(size: str, luts: int, multipliers: int, memory: int) -> FpgaTarget:
    return FpgaTarget(
        "fpga", f"ecp5-{size}", family="ecp5", lut_inputs=4, luts=luts, flipflops=luts, multipliers=multipliers, memory_kbit=memory,
        synthesis="synth_ecp5", place=f"--{size}",
    )  # fmt: skip


def _xc7(name: str, luts: int, multipliers: int, memory: int) -> FpgaTarget:
    return FpgaTarget(
        "fpga", name, family="xc7", lut_inputs=6, addends=3, luts=luts, flipflops=2 * luts, multipliers=multipliers, memory_kbit=memory,
        synthesis="synth_xilinx -family xc7 -flatten -noiopad -noclkbuf",
    )  # fmt: skip


TARGETS: dict[str, FpgaTarget] = {
    "ecp5-25k": _ecp5("25k", 24288, 28, 1008),
    "ecp5-45k": _ecp5("45k", 43848, 72, 1944),
    "ecp5-85k": _ecp5("85k", 83640, 156, 3744),
    "xc7a35t": _xc7("xc7a35t", 20800, 90, 1800),
    "xc7": _xc7("xc7", 63400, 240, 4860),
}
"""Devices by name; ``xc7`` is an Artix-7 100T."""
