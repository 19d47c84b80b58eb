"""How the integer kernels for ARM store a quantized matrix: the panels of all CPUs, with unsigned codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qcompile.codegen.kernels.arm.products import BYTES
from qcompile.codegen.kernels.cpu.panels import Panels
from qcompile.formats import Quantized


@dataclass(frozen=True)
class UnsignedPanels(Panels):
    """Panels of unsigned codes (signed ones if they are symmetric and of 8 bits, or ``twos_complement``); positions beyond
    a group count 0."""

    @property
    def centre(self) -> int:
        """What a micro-kernel takes off the codes it loads."""
        return 128 if self.bits == 8 and not self.fmt.symmetric else 0

    @property
    def bias(self) -> int:
        """What is added to a symmetric code to store it."""
        return 0 if self.bits == 8 or self.twos_complement else -self.fmt.qmin

    def pack_codes(self, weight: Quantized) -> np.ndarray:
        """The panels, uint8 ``(count, groups * rows_per_group, row_bytes)``."""
        source = self.source()
        codes = weight.codes.astype(np.int16) + (self.bias if self.fmt.symmetric else 0)
        padded = np.where(source[:, None] >= 0, codes[np.maximum(source, 0)], self.centre) & ((1 << self.bits) - 1)
        rows = self.groups * self.rows_per_group
        return self.layout.pack(padded.astype(np.uint8)).reshape(self.count, rows, self.row_bytes)

    @cached_property
    def row_vectors(self) -> int:
        """Registers of one vector of columns in a panel row."""
        return self.row_bytes // (self.vectors * BYTES)
