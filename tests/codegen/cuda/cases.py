"""What is executed on a GPU: formats x shapes, each over many numbers of rows. Shared by tests and by the script that
prepares sources on a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.codegen.kernels.cuda import tuned
from qcompile.codegen.kernels.cuda.attention import CudaAttention
from qcompile.codegen.kernels.cuda.cache import CudaCacheAttention
from qcompile.codegen.kernels.cuda.kronecker import KroneckerConfig
from qcompile.codegen.kernels.cuda.quantized_attention import CudaQuantizedAttention
from qcompile.codegen.kernels.cuda.rotation import RotationConfig
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, SpreadConfig
from qcompile.kernels import ROWS as BUCKETS
from qcompile.kernels import Plan, plan, quantizer
from qcompile.targets.cuda import CudaTarget


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        split: blocks along K of every kernel.
        variant: ``mma`` for tiled kernels without wgmma, ``wide`` for unusual tiles, ``exact`` for codes around zero,
            ``planes`` for bit planes, ``persistent``, ``sliced`` and ``bulk`` for kernels of one row, which take others one by one,
            ``cluster`` for splits that add up in clusters, ``ring`` for those with weights in rings of their own,
            ``shared`` for blocks that share rows of x.
    """

    weight: str
    k: int
    n: int
    activation: str = "none"
    dtype: str = "float16"
    bias: bool = False
    split: int = 0
    variant: str = ""

    def configs(self) -> dict[int, dict[str, Any]]:
        """Config entries to force, by bucket of rows."""
        # Rings are as deep as the split that was expected allows; without them any number of stages will do.
        parts: dict[str, Any] = {"split": self.split, "ring": 0, "resident": 0} if self.split else {}
        forced = {rows: dict(parts) for rows in BUCKETS}
        integer = {"none": "", "e4m3": "-fp8"}.get(self.activation, "-int8")
        tiled = {"family": "cuda-tiled" + integer}
        tiles: dict[int, dict[str, Any]] = {}
        if self.variant == "mma":
            tiles = {
                16: {"rows": 16, "wg": 1, "mt": 4, "stages": 4},
                32: {"rows": 32, "wg": 2, "mt": 2, "stages": 4},
                64: {"rows": 64, "wg": 2, "mt": 2, "stages": 3},
                128: {"rows": 128, "wg": 2, "mt": 1, "stages": 3},
                256: {"rows": 96, "wg": 1, "mt": 1, "stages": 3},
                512: {"rows": 64, "wg": 1, "mt": 2, "stages": 3},
            }
            tiled["wgmma"] = False  # type: ignore[assignment]
        elif self.variant == "wide":
            most, some = (192, 64) if integer else (256, 96)
            tiles = {
                16: {"rows": 16, "wg": 2, "mt": 4, "stages": 3},
                32: {"rows": 32, "wg": 3, "mt": 1, "stages": 5},
                64: {"rows": 48, "wg": 1, "mt": 2, "stages": 3},
                128: {"rows": some, "wg": 4, "mt": 1, "stages": 3},
                256: {"rows": 64, "wg": 1, "mt": 1, "stages": 6},
                512: {
                    "rows": 96 if integer and ("/g" in self.weight or "mx" in self.weight) else most,
                    "wg": 2,
                    "mt": 1,
                    "stages": 3,
                },
            }
        elif self.variant == "cluster":
            most = {16: (16, 4, 1), 32: (32, 2, 2), 64: (64, 2, 1), 128: (128, 1, 2), 256: (128, 2, 1), 512: (96, 3, 1)}
            for bucket, (height, wg, mt) in most.items():
                tiles[bucket] = {"rows": height, "wg": wg, "mt": mt, "stages": 3, "cluster": True}
            tiled["wgmma"] = True  # type: ignore[assignment]
        elif self.variant == "ring":
            deep = {
                16: {"rows": 16, "wg": 4, "mt": 1, "ring": 4},
                32: {"rows": 32, "wg": 2, "mt": 2, "ring": 5, "overlap": True},
                64: {"rows": 64, "wg": 2, "mt": 1, "ring": 8, "resident": 2, "overlap": True},
                128: {"rows": 128, "wg": 1, "mt": 1, "stages": 4, "ring": 4, "overlap": True},
                256: {"rows": 96, "wg": 1, "mt": 2, "ring": 3, "overlap": True},
                512: {"rows": 64, "wg": 3, "mt": 1, "ring": 6, "stages": 4, "overlap": True},
            }
            tiles = {bucket: {"stages": 3, "cluster": True, **tile} for bucket, tile in deep.items()}
            tiled["wgmma"] = True  # type: ignore[assignment]
        elif self.variant == "shared":
            shared = {16: (16, 4, 1, 1, 2), 32: (32, 2, 2, 2, 2), 64: (64, 2, 1, 3, 2), 128: (128, 1, 1, 4, 2)}
            shared |= {256: (128, 1, 2, 2, 4), 512: (64, 3, 1, 1, 1)}
            for bucket, (height, wg, mt, split, share) in shared.items():
                tiles[bucket] = {"rows": height, "wg": wg, "mt": mt, "split": split, "share": share, "stages": 3}
                tiles[bucket] |= {"overlap": bucket != 64, "cluster": True}
            tiled = {"family": "cuda-tiled-shared" + integer, "wgmma": True}  # type: ignore[dict-item]
        for rows, tile in tiles.items():
            forced[rows] = {"split": 1, "ring": 0, "resident": 0, **forced[rows], **tiled, **tile}
        if self.variant == "exact":
            for rows in (1, 8, 16):
                forced[rows] = {**forced[rows], "family": "cuda-stream" + integer, "raw": False}
        if self.variant == "persistent":
            raw = integer == "" and self.weight[:4] in ("int2", "int3", "int4") and self.dtype == "float16"
            config = {"tn": 2 if self.bias else 1, "kw": 3 if self.k > 1000 else 2, "grid": 3, "stages": 4, "raw": raw}
            return {1: {"family": "cuda-stream-persistent" + integer, **config}}
        if self.variant == "sliced":
            division = {"tn": 4, "stages": 4, "wide": 2} if self.bias else {"tn": 3, "stages": 6}
            division |= {"split": max(self.split, 1), "cluster": self.split > 1, "overlap": self.k > 700}
            return {1: {"family": "cuda-stream-sliced", "kw": 4, **division}}
        if self.variant == "bulk":
            division = {"tn": 3, "split": max(self.split, 1), "cluster": self.split > 1, "early": self.bias}
            return {
                1: {"family": "cuda-stream-sliced", "kw": 4, "stages": 0, "bulk": True, "overlap": True, **division}
            }
        if self.variant == "planes":
            forced = {rows: {**given, "family": "cuda-planes"} for rows, given in forced.items()}
        if self.variant == "raw":
            for rows in (1, 8, 16):
                forced[rows] = {**forced[rows], "family": "cuda-stream", "raw": True, "tn": 2, "nw": 1, "kw": 4}
        return forced

    def plan(self, target: str = "sm_90a") -> Plan:
        """Its kernels."""
        return plan(
            self.k,
            self.n,
            self.weight,
            f"{self.activation}/token" if self.activation != "none" else "none",
            getattr(torch, self.dtype),
            target,
            self.bias,
            rows=(1,) if self.variant in ("persistent", "sliced", "bulk") else BUCKETS,
            configs=self.configs(),
        )


@dataclass(frozen=True)
class TunedCase(Case):
    """The measured configs of one layer, on a smaller matrix.

    Attributes:
        entries: (rows, key in the table).
    """

    entries: tuple[tuple[int, str], ...] = ()

    def configs(self) -> dict[int, dict[str, Any]]:
        """Those of the table."""
        return {rows: dict(tuned.table()[key]) for rows, key in self.entries}


def tuned_cases(arch: str) -> list[TunedCase]:
    """One case for every set of configs in the table that is not another's."""
    sets: dict[tuple[str, str, str, str], list[tuple[int, str]]] = {}
    for key in tuned.table():
        chip, weight, dtype, n, k, rows = key.split()
        if chip == arch:
            sets.setdefault((weight, dtype, n, k), []).append((int(rows), key))
    cases, seen = [], set()
    for (weight, dtype, _, k), entries in sets.items():
        activation = {"int8": "int8", "float8_e4m3fn": "e4m3"}.get(dtype, "none")
        # Of kernels that hold all of K, as much as was measured.
        whole = any(tuned.table()[key].get("bulk") for _, key in entries)
        found = TunedCase(weight, int(k) if whole else 8448, 1032, activation, entries=tuple(entries))
        content = (weight, dtype, repr(sorted(found.configs().items())))
        if content not in seen:
            seen.add(content)
            cases.append(found)
    return cases


CASES = [
    Case("int4/g128", 512, 256),
    Case("int4/g128", 1031, 259, bias=True),
    Case("int4/g128", 2048, 320, split=3),
    Case("int4/g128", 1536, 1000, dtype="bfloat16", bias=True, variant="mma"),
    Case("int4/g128", 1100, 776, variant="wide"),
    Case("int4/g128", 640, 136, variant="exact"),
    Case("int4/g32/asym", 515, 77, split=2, variant="raw"),
    Case("int4/g64/asym", 640, 96, dtype="bfloat16"),
    Case("int4", 777, 131),
    Case("int4/asym", 384, 200, bias=True, variant="mma"),
    Case("int2/g128", 1100, 160, split=2),
    Case("int2/g32/asym", 300, 48, dtype="bfloat16"),
    Case("int2/asym", 700, 520, variant="wide"),
    Case("int3/g64", 530, 133, variant="raw"),
    Case("int3/g128/asym", 768, 128, dtype="bfloat16", split=2),
    Case("int8/g128", 512, 72, bias=True),
    Case("int8/asym", 333, 65),
    Case("int8/g64/asym", 700, 80, dtype="bfloat16", variant="mma"),
    Case("int8", 1031, 259, "int8", bias=True),
    Case("int8", 2048, 512, "int8", split=2),
    Case("int8", 900, 700, "int8", variant="mma"),
    Case("int4", 777, 131, "int8", dtype="bfloat16"),
    Case("int4/g128", 1536, 200, "int8", split=3),
    Case("int4/g64", 1000, 600, "int8", variant="wide"),
    Case("int2/g64", 512, 96, "int8"),
    Case("int4/g32/asym", 700, 264, "int8"),
    Case("int4/g128/asym", 1100, 328, "int8", dtype="bfloat16", variant="mma"),
    Case("int4/g32", 400, 130, "int8", variant="mma", split=2),
    Case("int3/g32/asym", 520, 72, "int8", variant="wide"),
    Case("int3", 300, 80, "int8"),
    Case("int2/asym", 640, 100, "int8"),
    Case("nf4/g64", 1100, 136),
    Case("nf4", 520, 72, dtype="bfloat16", bias=True, variant="mma"),
    Case("fp4/g128", 1031, 259, split=2),
    Case("mxfp4", 640, 200, variant="wide"),
    Case("nvfp4", 400, 100),
    Case("nf3/g32", 700, 80, dtype="bfloat16"),
    Case("codebook4/g64", 512, 96, variant="exact"),
    Case("fp8", 777, 131),
    Case("mxfp8", 500, 88, dtype="bfloat16"),
    Case("dual4/g128", 1100, 328, "int8", bias=True),
    Case("dual4/g32", 600, 90, "int8", split=2, variant="mma"),
    Case("fp8", 1031, 259, "e4m3", bias=True),
    Case("int4/g128", 1536, 200, "e4m3", split=3),
    Case("int4", 640, 130, "e4m3", dtype="bfloat16", variant="mma"),
    Case("mxfp4", 512, 264, "e4m3", variant="wide"),
    Case("int6", 1100, 200, "int6", bias=True),
    Case("int5/asym", 600, 72, "int4", dtype="bfloat16"),
    Case("int2", 1031, 96, "int8", variant="planes"),
    Case("int1", 2048, 64, "int2", split=2),
    Case("int4/g128", 2048, 320, split=3, variant="cluster"),
    Case("int4/g64/asym", 1100, 262, dtype="bfloat16", bias=True, split=2, variant="cluster"),
    Case("int4", 1031, 259, "int8", bias=True, split=4, variant="cluster"),
    Case("int8", 2048, 512, "int8", split=8, variant="cluster"),
    Case("int4/g128", 1536, 200, "e4m3", split=2, variant="cluster"),
    Case("int4", 1031, 259, "int8", bias=True, split=4, variant="ring"),
    Case("int8", 2048, 512, "int8", split=2, variant="ring"),
    Case("int4", 1536, 331, "int8", variant="ring"),
    Case("int4/g32/asym", 700, 264, "int8", split=2, variant="ring"),
    Case("dual4/g128", 1100, 328, "int8", bias=True, split=3, variant="ring"),
    Case("int4/g128", 2048, 320, split=3, variant="ring"),
    Case("int3/g64/asym", 1100, 262, dtype="bfloat16", bias=True, split=2, variant="ring"),
    Case("int4", 1031, 259, "int8", bias=True, variant="shared"),
    Case("int8", 2048, 512, "int8", variant="shared"),
    Case("int2", 640, 1000, "int8", variant="shared"),
    Case("fp8", 1100, 331, "e4m3", bias=True, variant="shared"),
    Case("int4", 1536, 200, "e4m3", variant="shared"),
    Case("int4/g128", 1100, 328, bias=True, variant="persistent"),
    Case("int4/g32/asym", 515, 77, variant="persistent"),
    Case("int3/g64", 1031, 136, variant="persistent"),
    Case("int2", 640, 130, bias=True, variant="persistent"),
    Case("int2/g64/asym", 1100, 160, dtype="bfloat16", variant="persistent"),
    Case("nf4/g64", 1100, 136, bias=True, variant="persistent"),
    Case("mxfp4", 640, 200, dtype="bfloat16", variant="persistent"),
    Case("fp8", 777, 131, variant="persistent"),
    Case("int8", 1031, 259, "int8", bias=True, variant="persistent"),
    Case("int4/g32/asym", 700, 264, "int8", variant="persistent"),
    Case("dual4/g128", 1100, 328, "int8", variant="persistent"),
    Case("int4/g128", 1536, 200, "e4m3", variant="persistent"),
    Case("int2/g128", 1100, 328, bias=True, variant="sliced"),
    Case("int2/g32/asym", 515, 77, variant="sliced"),
    Case("int2/asym", 700, 96, dtype="bfloat16", variant="sliced"),
    Case("int2/g256", 2048, 136, split=2, variant="sliced"),
    Case("int3/g64", 1031, 136, bias=True, variant="sliced"),
    Case("int3/g128/asym", 768, 128, dtype="bfloat16", variant="sliced"),
    Case("int4/g128", 1031, 259, bias=True, dtype="bfloat16", split=2, variant="sliced"),
    Case("int4/g64/asym", 1100, 160, variant="sliced"),
    Case("int4", 777, 131, variant="sliced"),
    Case("int8/g128", 512, 72, bias=True, variant="sliced"),
    Case("int8/asym", 2000, 65, split=4, variant="sliced"),
    Case("int8/g32/asym", 700, 80, dtype="bfloat16", variant="sliced"),
    Case("int2/g128", 1280, 328, variant="bulk"),
    Case("int3/g64/asym", 896, 136, dtype="bfloat16", bias=True, variant="bulk"),
    Case("int4/g64", 1024, 259, bias=True, split=2, variant="bulk"),
    Case("int8", 2031, 77, split=3, variant="bulk"),
]
"""Odd and even extents, all bits, groups, both kinds of zero points, both float types, with and without split-k."""


def quantizers(arch: str) -> list[CudaRowwise]:
    """Row quantizers of the cases above and of `tuned_cases`."""
    found = {quantizer(128, bits, torch.float16): None for bits in (4, 8)}  # of queries and keys
    for case in [*CASES, *tuned_cases(arch), Case("int8", 256, 64, "int8")]:
        if case.activation not in ("none", "e4m3"):
            bits = int(case.activation.removeprefix("int"))
            found[quantizer(case.k, bits, getattr(torch, case.dtype))] = None
    return list(found)


ROTATED = {"quantize": "token", "dtype": "float16"}

ROWWISE = {
    "rms": CudaRowwise(512, norm="rms", gamma=True, quantize="token", out="float16"),
    "layer": CudaRowwise(387, norm="layer", gamma=True, beta=True, quantize="token", out="float32"),
    "wide": CudaRowwise(11008, norm="rms", gamma=True, out="float32", dtype="float16"),
    "plain": CudaRowwise(1000, quantize="token", bits=4, dtype="bfloat16"),
    "one": CudaRowwise(7, norm="layer", quantize="token", clip=0.9),
    "static": CudaRowwise(384, activation="gelu", quantize="tensor", zero_point=5),
    "swiglu": CudaRowwise(1376, gated=True, activation="silu", quantize="token", dtype="float16"),
    "rotated": CudaRowwise(4096, norm="rms", gamma=True, quantize="token", hadamard=4096, dtype="float16"),
    "blocks": CudaRowwise(1536, gated=True, activation="gelu_tanh", quantize="token", hadamard=128),
    "core12": CudaRowwise(1536, quantize="token", hadamard=1536, dtype="float16", bits=4),
    "core28": CudaRowwise(14336, gated=True, activation="silu", quantize="token", hadamard=14336, dtype="float16"),
    "direct28": CudaRowwise(14336, quantize="token", hadamard=14336, dtype="float16"),
    "direct4096": CudaRowwise(4096, quantize="token", hadamard=4096, dtype="float16"),
    "direct8192": CudaRowwise(8192, quantize="token", hadamard=8192, dtype="float16"),
    "direct28672": CudaRowwise(28672, quantize="token", hadamard=28672, dtype="float16"),
    "plain28672": CudaRowwise(28672, quantize="token", dtype="float16"),
    "direct256": CudaRowwise(11008, quantize="token", hadamard=256, dtype="bfloat16", bits=4),
    "largest": CudaRowwise(16384, quantize="token", hadamard=16384, dtype="float16"),
    "core20": CudaRowwise(5120, quantize="token", hadamard=5120, dtype="bfloat16", bits=4),
    "core36": CudaRowwise(9216, quantize="token", hadamard=9216, dtype="float16"),
    "half": CudaRowwise(
        768, norm="layer", gamma=True, beta=True, quantize="token", hadamard=384, clip=0.9, out="float32"
    ),
    "static_rotated": CudaRowwise(2048, activation="gelu", quantize="tensor", zero_point=5, hadamard=2048),
    "ahead": CudaRowwise(4096, **ROTATED, hadamard=4096, config=RotationConfig(8, 1, resident=4, ahead=True)),
    "twice": CudaRowwise(28672, **ROTATED, hadamard=28672, config=RotationConfig(14, 4, resident=2, twice=True)),
    "kronecker": CudaRowwise(4096, **ROTATED, kronecker=(64, 64)),
    "kronecker_odd": CudaRowwise(
        1376, norm="rms", gamma=True, factor=True, quantize="token", bits=4, out="float32", kronecker=(32, 43)
    ),
    "kronecker_even": CudaRowwise(5504, **ROTATED, bits=4, kronecker=(64, 86)),
    "kronecker_blocks": CudaRowwise(5760, quantize="token", dtype="bfloat16", clip=0.9, kronecker=(20, 96)),
    "kronecker_small": CudaRowwise(
        384, gated=True, activation="silu", quantize="token", dtype="float16", kronecker=(16, 24)
    ),
    "kronecker_static": CudaRowwise(
        2288, norm="layer", gamma=True, beta=True, quantize="tensor", zero_point=5, dtype="float16", kronecker=(44, 52)
    ),
    "kronecker_wide": CudaRowwise(28672, **ROTATED, kronecker=(128, 224)),
    "kronecker_kept": CudaRowwise(2752, **ROTATED, kronecker=(43, 64), config=KroneckerConfig(3, kept=True)),
    "kronecker_paired": CudaRowwise(
        5504, norm="rms", gamma=True, quantize="token", kronecker=(86, 64), config=KroneckerConfig(2, 2, paired=True)
    ),
    "spread": CudaRowwise(8192, norm="rms", gamma=True, quantize="token", dtype="float16", config=SpreadConfig()),
    "spread_layer": CudaRowwise(
        2056,
        norm="layer",
        gamma=True,
        beta=True,
        factor=True,
        quantize="token",
        bits=4,
        out="float32",
        config=SpreadConfig(),
    ),
    "kronecker_overlaid": CudaRowwise(
        11008, norm="rms", gamma=True, quantize="token", kronecker=(86, 128), config=KroneckerConfig(6, overlaid=True)
    ),
}
"""Row kernels, by the name of the feature they add."""

CLUSTERS = {
    "shared": CudaRowwise(14336, **ROTATED, hadamard=14336, config=RotationConfig(8, 2, blocks=4)),
    "shared_by_seven": CudaRowwise(28672, **ROTATED, hadamard=28672, config=RotationConfig(4, 4, blocks=7)),
    "shared_layer": CudaRowwise(
        8192,
        norm="layer",
        gamma=True,
        beta=True,
        quantize="token",
        hadamard=4096,
        out="float16",
        config=RotationConfig(4, 1, blocks=4),
    ),
    "gathered": CudaRowwise(
        8192, **ROTATED, hadamard=8192, config=RotationConfig(1, 4, blocks=8, gathered=True, staged=True, ahead=True)
    ),
    "gathered28": CudaRowwise(
        14336, **ROTATED, hadamard=14336, bits=4, config=RotationConfig(7, 1, blocks=8, gathered=True, staged=True)
    ),
    "gathered_blocks": CudaRowwise(
        5120, **ROTATED, hadamard=1024, config=RotationConfig(5, 1, blocks=4, gathered=True)
    ),
    "staged": CudaRowwise(28672, **ROTATED, hadamard=28672, config=RotationConfig(8, 4, blocks=4, staged=True)),
    "kronecker_shared": CudaRowwise(
        28672, **ROTATED, kronecker=(128, 224), config=KroneckerConfig(4, blocks=7, kept=True, ahead=True)
    ),
    "kronecker_shared_odd": CudaRowwise(
        5504,
        norm="rms",
        gamma=True,
        quantize="token",
        out="float32",
        kronecker=(64, 86),
        config=KroneckerConfig(2, blocks=3),
    ),
    "spread_shared": CudaRowwise(8192, norm="rms", gamma=True, quantize="token", config=SpreadConfig(4)),
    "shared_blocks": CudaRowwise(
        5120,
        gated=True,
        activation="silu",
        quantize="token",
        hadamard=1024,
        dtype="bfloat16",
        config=RotationConfig(1, 4, blocks=3),
    ),
}
"""Row kernels of blocks that share a row."""


def rowwise(target: CudaTarget) -> dict[str, CudaRowwise]:
    """The row kernels a chip takes."""
    return ROWWISE | (CLUSTERS if target.has("cluster") else {})


ATTENTION = {
    "merged": CudaAttention(8, 4, 64, 64, 0.125, causal=True, mask="bool", mask_axes=(True, False, False)),
    "rows": CudaAttention(12, 12, 32, 32, 0.1767, layout="rows", mask="float", mask_axes=(True, True, True)),
    "heads": CudaAttention(4, 1, 40, 24, 0.15, layout="heads", dtype="float16", out="float16"),
    "square": CudaAttention(8, 4, 64, 64, 0.125, mask="bool", mask_axes=(True, False, True)),
}
"""Attention kernels."""

QUANTIZED_ATTENTION = {
    "int8": CudaQuantizedAttention(8, 2, 128, 128, 0.0884, causal=True),
    "int4": CudaQuantizedAttention(3, 3, 96, 64, 0.102, "int4"),
    "e4m3": CudaQuantizedAttention(4, 2, 64, 96, 0.125, values="e4m3", causal=True),
    "binary": CudaQuantizedAttention(4, 4, 128, 64, 0.0884, "binary"),
    "binary64": CudaQuantizedAttention(6, 3, 64, 64, 0.125, "binary", "e4m3", out="float32"),
    "wide": CudaQuantizedAttention(2, 1, 256, 128, 0.0625, "int8", "e4m3", out="bfloat16"),
}
"""Attention with quantized scores."""

ATTENTION_CALLS = [("int8", "float16"), ("int8", "e4m3"), ("int4", "e4m3")]
"""Scores and values `qcompile.kernels.attention` is called with, for 8 heads of 128 over 2."""


def attention_calls() -> list[CudaQuantizedAttention]:
    """The kernels of those calls."""
    return [CudaQuantizedAttention(8, 2, 128, 128, 128**-0.5, s, v, True) for s, v in ATTENTION_CALLS]


CACHES = {
    "int8": CudaCacheAttention(32, 8, 128, 8, 0.0884),
    "int4": CudaCacheAttention(8, 8, 64, 4, 0.125, splits=3),
    "int2": CudaCacheAttention(12, 2, 96, 2, 0.1),
    "wide": CudaCacheAttention(5, 1, 256, 4, 0.0625, splits=1),
}
"""Attention over quantized caches."""

ROWS = [*range(1, 34), 64, 100, 128, 257, 4096]
"""Numbers of rows every case is executed with."""
