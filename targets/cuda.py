"""CUDA targets: compute capabilities with their features and the sizes kernels are planned with.

Feature names are those kernels ask for with `Target.has`:

    mma_f16   fp16 mma.sync         mma_bf16  bf16 mma.sync          mma_s8   int8 mma.sync, exact int32 sums
    mma_s4    int4 mma.sync in hardware (later chips emulate it)      mma_b1   binary mma.sync with and.popc
    fp8       E4M3 and E5M2 mma     cp_async  copies to shared memory that bypass registers
    wgmma     warpgroup mma with operands in shared memory            tma      bulk tensor copies
    pdl       programmatic dependent launch: a kernel starts while the one before ends
    cluster   clusters of blocks, st.async between them; stmatrix

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (table of technical specifications); PTX ISA, target notes of
the mma, cp.async and wgmma instructions.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from qcompile.errors import TargetError
from qcompile.targets.target import Target

_AMPERE = frozenset({"mma_f16", "mma_bf16", "mma_s8", "mma_s4", "mma_b1", "cp_async"})
_ADA = _AMPERE | {"fp8"}
_HOPPER = (_ADA - {"mma_s4"}) | {"wgmma", "tma", "pdl", "cluster"}


@dataclass(frozen=True)
class CudaTarget(Target):
    """A GPU architecture.

    Attributes:
        shared: bytes of shared memory one block may take.
        shared_sm: bytes of shared memory of one multiprocessor.
        multiprocessors: of the typical chip of this architecture; split-k is planned for it.
        l2: bytes of second-level cache of that chip.
        bandwidth: bytes per second its memory delivers, roughly.
    """

    shared: int = 0
    shared_sm: int = 0
    multiprocessors: int = 1
    l2: int = 0
    bandwidth: float = 1e12

    def tvm(self, arch: str = "") -> Any:
        """The ``tvm.target.Target`` whose host code is C++ in the same translation unit as the kernels."""
        import tvm

        spec = {
            "kind": "cuda",
            "arch": arch or self.cpu,
            "max_shared_memory_per_block": self.shared,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "registers_per_block": 65536,
        }
        return tvm.target.Target(spec, host={"kind": "cuda_host"})

    def tvm_scheduling(self) -> Any:
        """The same for schedule rules, which read the number after ``sm_`` and take letters for an older chip."""
        return self.tvm(self.cpu.rstrip("a"))

    @property
    def gencode(self) -> str:
        """What ``nvcc -gencode`` takes."""
        number = self.cpu.removeprefix("sm_")
        return f"arch=compute_{number},code=sm_{number}"


def _chip(arch: str, features: frozenset[str], shared: int, shared_sm: int, sms: int, l2: int, bw: float) -> CudaTarget:
    return CudaTarget(
        "cuda", arch, features, shared=shared << 10, shared_sm=shared_sm << 10, multiprocessors=sms, l2=l2 << 20,
        bandwidth=bw,
    )  # fmt: skip


TARGETS: dict[str, CudaTarget] = {
    "sm_80": _chip("sm_80", _AMPERE, 163, 164, 108, 40, 1.6e12),
    "sm_86": _chip("sm_86", _AMPERE, 99, 100, 84, 6, 0.8e12),
    "sm_89": _chip("sm_89", _ADA, 99, 100, 128, 72, 0.9e12),
    "sm_90a": _chip("sm_90a", _HOPPER, 227, 228, 132, 50, 4.2e12),
}
"""Targets by architecture; the numbers after the features are those of the A100, RTX 3090, RTX 4090 and H200."""

_BY_CAPABILITY = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}


def for_capability(major: int, minor: int) -> CudaTarget:
    """The target of a device by its compute capability.

    Raises:
        TargetError: kernels are not generated for that architecture.
    """
    if (major, minor) not in _BY_CAPABILITY:
        raise TargetError(
            f"no CUDA target for compute capability {major}.{minor}; kernels are generated for {', '.join(TARGETS)}"
        )
    return TARGETS[_BY_CAPABILITY[major, minor]]


def host() -> CudaTarget:
    """The architecture of the first GPU of this machine, asked of the driver.

    Raises:
        TargetError: there is none, or none that kernels are generated for.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        driver = None
    value = ctypes.c_int()
    found = []
    if driver is not None and driver.cuInit(0) == 0:
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0:
                found.append(value.value)
    if len(found) != 2:
        raise TargetError(f"there is no CUDA device here to compile for; name an architecture: {', '.join(TARGETS)}")
    return for_capability(*found)
