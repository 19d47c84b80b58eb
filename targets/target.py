"""A target: one instruction set with what it can execute. Knows nothing of the rest of the compiler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        kind: ``x86``, ``arm``, ``cuda``, ``fpga`` or ``onnxruntime``.
        cpu: the LLVM name of the processor (``x86-64-v3``, ``znver4``, ``cortex-a76``) or the GPU architecture.
        features: instruction-set features kernels may ask for, e.g. ``avx2``, ``avx512``, ``vnni``, ``dotprod``.
        cores: number of cores the tuned choice assumes.
        triple: LLVM target triple; empty for the host's own.
        attributes: LLVM features added to those of ``cpu``, e.g. ``+avx512vnni``.
    """

    kind: str
    cpu: str = ""
    features: frozenset[str] = field(default_factory=frozenset)
    cores: int = 1
    triple: str = ""
    attributes: tuple[str, ...] = ()

    def has(self, *features: str) -> bool:
        """Whether every named feature is available."""
        return set(features) <= self.features

    def tvm(self) -> Any:
        """The ``tvm.target.Target`` that generates code for this machine."""
        import tvm

        spec: dict[str, Any] = {"kind": "llvm", "mcpu": self.cpu, "num-cores": self.cores}
        if self.triple:
            spec["mtriple"] = self.triple
        if self.attributes:
            spec["mattr"] = list(self.attributes)
        return tvm.target.Target(spec)

    def __str__(self) -> str:
        return f"{self.kind}/{self.cpu}{''.join(self.attributes)}" if self.cpu else self.kind
