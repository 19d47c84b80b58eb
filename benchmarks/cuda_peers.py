"""Peers of the CUDA linear kernels, each a function ``(m, n, k) -> list of calls`` on distinct weights.

fp16            torch.mm (cuBLAS)
int4pack        torch._weight_int4pack_mm (tinygemm), bfloat16, groups of 128
marlin          the kernels in PyPI's gptqmodel source distribution, groups of 128; built by
                ``python benchmarks/cuda_peers.py GPTQMODEL_SOURCE OUT.so`` and found through QCOMPILE_MARLIN=OUT.so
gemlite         PyPI's gemlite (Triton), groups of 128, if installed
scaled_mm       torch._scaled_mm (cuBLASLt), e4m3 with a scale per tensor, bfloat16 results
int_mm          torch._int_mm (cuBLASLt); int_mm_scaled adds separate scaling to float16
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcompile.codegen.kernels.cuda.measure import CACHE

Call = Callable[[], Any]


def rotated(make: Callable[[], Any], size: int) -> list[Any]:
    """``make()`` as often as it takes to leave the cache."""
    return [make() for _ in range(-(-CACHE // size) + 1)]


def fp16(m: int, n: int, k: int) -> list[Call]:
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    ws = rotated(lambda: torch.randn(n, k, device="cuda", dtype=torch.float16), 2 * n * k)
    return [lambda w=w: torch.mm(x, w.t()) for w in ws]


def int_mm(m: int, n: int, k: int, scaled: bool = False) -> list[Call]:
    """Takes more than 16 rows."""
    if m <= 16:
        return []
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    ws = rotated(lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"), n * k)
    a, b = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
    if scaled:
        return [lambda w=w: (torch._int_mm(x, w.t()) * (a * b)).half() for w in ws]
    return [lambda w=w: torch._int_mm(x, w.t()) for w in ws]


def int_mm_scaled(m: int, n: int, k: int) -> list[Call]:
    return int_mm(m, n, k, scaled=True)


def scaled_mm(m: int, n: int, k: int) -> list[Call]:
    """Multiples of 16 alone."""
    x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    ws = rotated(lambda: torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn), n * k)
    one = torch.ones((), device="cuda")
    return [lambda w=w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16) for w in ws]


def int4pack(m: int, n: int, k: int) -> list[Call]:
    if m > 128:
        return []
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)

    def make() -> torch.Tensor:
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        return torch._convert_weight_to_int4pack(raw, 8)

    return [lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in rotated(make, n * k // 2)]


def marlin(m: int, n: int, k: int) -> list[Call]:
    """As vLLM calls it: float32 reduction, workspace of zeros."""
    path = os.environ.get("QCOMPILE_MARLIN", "")
    if not path:
        return []
    torch.ops.load_library(path)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    scales = torch.rand(k // 128, n, device="cuda", dtype=torch.float16)
    workspace = torch.zeros(
        torch.cuda.get_device_properties(0).multi_processor_count * 4, dtype=torch.int32, device="cuda"
    )
    uint4b8 = _scalar_type_id()
    op = torch.ops.gptqmodel_marlin_fp16.gptq_marlin_gemm_fp16

    def make() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (k // 16, n * 2), dtype=torch.int32, device="cuda")

    def call(w: torch.Tensor) -> Any:
        return op(x, None, w, None, scales, None, None, None, None, workspace, uint4b8, m, n, k, True, False, True)

    return [lambda w=w: call(w) for w in rotated(make, n * k // 2)]


def _scalar_type_id() -> int:
    """vLLM's id of "unsigned 4 bits, bias 8": fields of 8, 8, 1, 32, 1 and 8 bits, the last (NaNs) at its default 1."""
    return 4 << 8 | 8 << 17 | 1 << 50


def gemlite(m: int, n: int, k: int) -> list[Call]:
    """4 bits, groups of 128, as its own example packs them."""
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return []
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    layers = []
    for _ in range(-(-CACHE // (n * k // 2)) + 1):
        layer = GemLiteLinear(4, 128, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        groups = n * k // 128
        scale = torch.rand(groups, 1, device="cuda", dtype=torch.float16)
        zero = torch.full((groups, 1), 8.0, device="cuda", dtype=torch.float16)
        layer.pack(codes, scale, zero, None)
        layers.append(layer)
    return [lambda layer=layer: layer(x) for layer in layers]


PEERS: dict[str, Callable[[int, int, int], list[Call]]] = {
    f.__name__: f for f in (fp16, int4pack, marlin, gemlite, int_mm, int_mm_scaled, scaled_mm)
}


def build_marlin(root: Path, out: Path) -> None:
    """Compile what the benchmark calls: fp16, symmetric 4 bits, groups of 128."""
    from torch.utils.cpp_extension import load

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(root / "gptqmodel_ext" / "marlin", folder / "src")
        source = folder / "src"
        main = source / "gptq_marlin.cu"
        text = main.read_text()
        kept = "COMMON_GET_IF(vllm::kU4B8, pipe_stages)"
        calls = r"^ +(?:COMMON|NVFP4|BIGGROUP|FZP|ACT|MXFP4|MXFP8)_GET_IF\(vllm::.*\)$"
        text = re.sub(calls, lambda c: c.group(0) if kept in c.group(0) else "", text, flags=re.M)
        text = re.sub(
            r"_GET_IF\(W_TYPE, (\d), N_BLOCKS, K_BLOCKS, (\w+), STAGES, (?:-1|2|4), NUM_THREADS, +\\\n +false\)",
            "",
            text,
        )
        main.write_text(text)
        instances = re.findall(
            r"template __global__ void Marlin<half, vllm::kU4B8.id.*pipe_stages, 8, false>.*;",
            "\n".join(_instances(source)),
        )
        files = [source / "gptq_marlin_fp16.cu", source / "marlin_torch_fp16.cpp", source / "gptq_marlin_repack.cu"]
        files.append(source / "awq_marlin_repack.cu")
        for i, instance in enumerate(instances):
            file = source / f"instance{i}.cu"
            body = f"namespace MARLIN_NAMESPACE_NAME {{\n{instance}\n}}\n"
            file.write_text(f'#include "kernel.h"\n#include "marlin_template.h"\n{body}')
            files.append(file)
        (folder / "build").mkdir()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
        flags = ["-O3", "-std=c++17", "-static-global-template-stub=false", "--expt-relaxed-constexpr"]
        flags += [
            f"-U__CUDA_NO_{x}__"
            for x in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
        ]
        load(
            "marlin_fp16", [str(f) for f in files], extra_cuda_cflags=flags, extra_include_paths=[str(source)],
            build_directory=str(folder / "build"), is_python_module=False, verbose=False,
        )  # fmt: skip
        shutil.copy(folder / "build" / "marlin_fp16.so", out)


def _instances(source: Path) -> list[str]:
    sys.path.insert(0, str(source))
    import generate_kernels

    return generate_kernels.render_templates_for_combo("vllm::kU4B8", "fp16")


if __name__ == "__main__":
    build_marlin(Path(sys.argv[1]), Path(sys.argv[2]))
