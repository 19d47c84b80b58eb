"""Instructions of ARM GEMV and GEMM kernels beside llama.cpp's, counted under qemu: exact, and the same in every run.

    make arm && python benchmarks/arm_gemm.py [--ggml DIRECTORY]

llama.cpp's kernels are those of the sdist of llama-cpp-python (ggml, NEON with dot products), cross-compiled here. Its rows
are the dot products of one vector with N weight rows, and the repacked matrix kernel for Q4_0; activations are quantized
already on both sides; ours are those of normal numbers (the look-up tables of `arm-tbl` depend a little on the data), and
building tables is counted. ``--ggml`` names an unpacked ``ggml`` folder; otherwise pip downloads the sdist.
An instruction count is no time: it leaves out memory, and how many instructions a processor issues at once.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qcompile.codegen import kernels
from qcompile.codegen.kernels import select
from qcompile.codegen.kernels.arm.harness import Executable
from qcompile.codegen.kernels.base import LinearProblem
from qcompile.codegen.tune.measure import inputs, random_weight
from qcompile.formats import parse_activation, parse_format
from qcompile.targets import arm, get_target

SDIST = "llama-cpp-python==0.3.16"
K = N = 4096
ROWS_OF_PEER = 64
"""Rows of weights a peer is counted on; its cost is the same for every row."""

PEERS = {
    # name: (function, elements and bytes of a block, what it is compared with)
    "Q2_K": ("ggml_vec_dot_q2_K_q8_K", 256, 84),
    "TQ2_0": ("ggml_vec_dot_tq2_0_q8_K", 256, 66),
    "Q3_K": ("ggml_vec_dot_q3_K_q8_K", 256, 110),
    "Q4_0": ("ggml_vec_dot_q4_0_q8_0", 32, 18),
    "Q4_0 repacked": ("ggml_gemv_q4_0_4x4_q8_0", 32, 18),
    "Q4_K": ("ggml_vec_dot_q4_K_q8_K", 256, 144),
    "Q8_0": ("ggml_vec_dot_q8_0_q8_0", 32, 34),
}
OURS = [
    "int1/g128", "int2", "int2/g128", "ternary/channel", "int3/g128", "int4/g128", "int4/g32", "int8",
    "bitplane2/g128", "mxfp4", "nf4/g64",
]  # fmt: skip

MAIN = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef void dot(int, float *, size_t, const void *, size_t, const void *, size_t, int);
extern dot %(dots)s;
extern void ggml_gemv_q4_0_4x4_q8_0(int, float *, size_t, const void *, const void *, int, int);
int main(void) {
    static float out[%(n)d];
    static uint8_t weights[%(n)d * %(k)d * 9 / 8], x[%(k)d * 2];
    memset(weights, 0x3c, sizeof weights);
    memset(x, 0x11, sizeof x);
    %(calls)s
    return 0;
}
"""


def download(folder: Path) -> Path:
    """The ggml folder of the sdist."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "-d", folder, SDIST]
    subprocess.run([*map(str, command)], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp/ggml"))


def peers(ggml: Path, work: Path) -> dict[str, float]:
    """Instructions per multiply-add of llama.cpp's kernels."""
    flags = ["-O3", "-DNDEBUG", "-march=armv8.2-a+dotprod+fp16", "-w", "-D_GNU_SOURCE", "-DGGML_USE_CPU_REPACK"]
    flags += ['-DGGML_VERSION="x"', '-DGGML_COMMIT="x"']
    flags += [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    sources = [
        "src/ggml.c", "src/ggml-quants.c", "src/ggml-cpu/quants.c", "src/ggml-cpu/arch/arm/quants.c",
        "src/ggml-cpu/repack.cpp", "src/ggml-cpu/arch/arm/repack.cpp",
    ]  # fmt: skip
    objects = []
    for source in sources:
        compiler = (
            ["aarch64-linux-gnu-g++", "-std=gnu++17"]
            if source.endswith("cpp")
            else ["aarch64-linux-gnu-gcc", "-std=gnu11"]
        )
        objects.append(work / (source.replace("/", "_") + ".o"))
        subprocess.run([*compiler, *flags, "-c", ggml / source, "-o", objects[-1]], check=True)
    calls, dots = [], []
    for function, elements, size in PEERS.values():
        row = K // elements * size
        if "gemv" in function:
            calls.append(f"{function}({K}, out, 0, weights, x, 1, {ROWS_OF_PEER});")
            continue
        dots.append(function)
        calls.append(
            f"for (int i = 0; i < {ROWS_OF_PEER}; i++) {function}({K}, out + i, 0, weights + i * {row}, 0, x, 0, 1);"
        )
    (work / "main.c").write_text(
        MAIN % {"n": ROWS_OF_PEER, "k": K, "dots": ", ".join(dots), "calls": "\n    ".join(calls)}
    )
    program = work / "peers"
    link = ["-O2", "-w", "-static", work / "main.c", *objects, "-o", program, "-lm", "-lstdc++", "-lpthread"]
    # What the kernels do not call of ggml stays unresolved.
    subprocess.run(["aarch64-linux-gnu-gcc", *link, "-Wl,--unresolved-symbols=ignore-all"], check=True)
    printed = count(program, work)
    return {name: printed[function] / (K * ROWS_OF_PEER) for name, (function, _, _) in PEERS.items()}


def count(program: Path, work: Path) -> dict[str, int]:
    import qcompile.codegen.kernels.arm.harness as harness

    plugin = work / "count.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", plugin, harness.HERE / "count.c"], check=True)
    qemu, *rest = arm.emulator(get_target("cortex-a76"))
    done = subprocess.run(
        [qemu, "-plugin", str(plugin), "-d", "plugin", *rest, program], capture_output=True, text=True, check=True
    )
    lines = (line.split() for line in (done.stdout + done.stderr).splitlines() if line.startswith("count "))
    return {name: int(number) for _, name, number in lines}


def ours(cpu: str, formats: list[str], rows: list[int], families: list[str]) -> Iterator[tuple[str, int, float, str]]:
    """Format, number of rows, instructions per multiply-add, and the kernel: one of ``families``, or the one chosen."""
    target = get_target(cpu, cores=1)
    for spelling, m in ((spelling, m) for spelling in formats for m in rows):
        problem = LinearProblem(K, N, parse_format(spelling), parse_activation("int8"), m=m)
        choice = select(problem, target)
        named = [f for f in kernels.families("arm") if f.name in families and f.supports(problem, target)]
        for family, config in [(f, f.configs(problem, target)[0]) for f in named] or [(choice.family, choice.config)]:
            packed = list(family.pack(problem, config, random_weight(problem)).values())
            program = Executable({"gemm": family.build(problem, config, target, "gemm")}, target)
            out = np.zeros((m, N), np.float32)
            number = program.counts({"gemm": [*inputs(problem, m), *packed, out]})["gemm"]
            yield spelling, m, number / (K * N * m), family.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, help="unpacked ggml folder of llama.cpp")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cpu", nargs="*", default=["cortex-a76", "cortex-a53", "neoverse-v1"])
    parser.add_argument("--formats", nargs="*", default=OURS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--family", nargs="*", default=[], help="kernels to count instead of those chosen")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="arm-gemm-"))
    try:
        print(f"instructions per multiply-add, {K}x{N}, counted under qemu-user")
        reference = {}
        if not arguments.no_peers:
            reference = peers(arguments.ggml or download(work), work)
            for name, value in reference.items():
                print(f"  llama.cpp {name:16} M=1   {value:.4f}")
        for cpu in arguments.cpu:
            for spelling, m, value, kernel in ours(cpu, arguments.formats, arguments.rows, arguments.family):
                against = ""
                if cpu == "cortex-a76" and m == 1:
                    against = "".join(
                        f"  {value / reference[p]:.2f}x {p}" for p in _compared(spelling) if p in reference
                    )
                print(f"  {cpu:12} {spelling:16} M={m:<3} {value:.4f}  {kernel}{against}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compared(spelling: str) -> list[str]:
    table = {"int2": ["Q2_K", "TQ2_0"], "tern": ["Q2_K", "TQ2_0"], "int3": ["Q3_K"], "int8": ["Q8_0"]}
    return table.get(spelling[:4], ["Q4_0", "Q4_0 repacked", "Q4_K"] if spelling.startswith("int4") else [])


if __name__ == "__main__":
    main()
