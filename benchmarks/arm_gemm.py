"""Instructions of ARM GEMV and GEMM kernels beside llama.cpp's, counted under qemu: exact, and the same in every run.

    make tools && python benchmarks/arm_gemm.py [--ggml DIRECTORY]

llama.cpp's kernels are those of the sdist of llama-cpp-python (ggml, NEON with dot products, and with i8mm), cross-compiled here:
dot products of one vector with a row of weights, which is also what it runs for more vectors where it has nothing else; of two
with two rows on SMMLA; and the matrix kernels of repacked Q4_0. Activations are quantized already on both sides; ours are those of normal numbers (the look-up tables of `arm-tbl` depend a little on the data), and
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
from dataclasses import dataclass, replace
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
COLUMNS_OF_PEER = 64
"""Columns (rows of its weights) a peer is counted on; its cost is the same for every one."""


@dataclass(frozen=True)
class Peer:
    """A function of ggml, elements and bytes of a block of its weights, and rows of activations it takes at a time."""

    function: str
    elements: int
    size: int
    rows: int = 1

    def call(self) -> str:
        """C code that multiplies by `COLUMNS_OF_PEER` columns."""
        row = K // self.elements * self.size
        if "dot" not in self.function:
            return f"{self.function}({K}, out, {COLUMNS_OF_PEER}, weights, x, {self.rows}, {COLUMNS_OF_PEER});"
        arguments = f"{K}, out, 2, weights + i * {row}, {row}, x, {K * 2}, {self.rows}"
        return f"for (int i = 0; i < {COLUMNS_OF_PEER}; i += {self.rows}) {self.function}({arguments});"


DOTPROD = {
    "Q2_K": Peer("ggml_vec_dot_q2_K_q8_K", 256, 84),
    "TQ2_0": Peer("ggml_vec_dot_tq2_0_q8_K", 256, 66),
    "Q3_K": Peer("ggml_vec_dot_q3_K_q8_K", 256, 110),
    "Q4_0": Peer("ggml_vec_dot_q4_0_q8_0", 32, 18),
    "Q4_0 repacked": Peer("ggml_gemv_q4_0_4x4_q8_0", 32, 18),
    "Q4_0 repacked, 16 rows": Peer("ggml_gemm_q4_0_4x4_q8_0", 32, 18, 16),
    "Q4_K": Peer("ggml_vec_dot_q4_K_q8_K", 256, 144),
    "Q8_0": Peer("ggml_vec_dot_q8_0_q8_0", 32, 34),
}
I8MM = {
    **{name: DOTPROD[name] for name in ("Q2_K", "TQ2_0", "Q3_K")},
    "Q4_0 repacked, 16 rows": Peer("ggml_gemm_q4_0_4x8_q8_0", 32, 18, 16),
    **{f"{name}, 2 rows": replace(DOTPROD[name], rows=2) for name in ("Q4_0", "Q4_K", "Q8_0")},
}
PEERS = {"cortex-a76": ("armv8.2-a+dotprod+fp16", DOTPROD), "neoverse-v1": ("armv8.6-a+fp16", I8MM)}
"""By processor: the architecture ggml is compiled for, and its functions."""

OURS = [
    "int1/g128", "int2", "int2/g128", "ternary/channel", "int3/g128", "int4/g128", "int4/g32", "int8",
    "bitplane2/g128", "mxfp4", "nf4/g64", "pow2sum2/g128", "mxfp6", "mxfp8",
]  # fmt: skip

MAIN = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef void dot(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef void matrix(int, float *, size_t, const void *, const void *, int, int);
extern dot %(dots)s;
extern matrix %(matrices)s;
int main(void) {
    static float out[%(n)d * 16];
    static uint8_t weights[%(n)d * %(k)d * 9 / 8], x[%(k)d * 2 * 16];
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


def peers(ggml: Path, work: Path, cpu: str) -> dict[str, float]:
    """Instructions per multiply-add of llama.cpp's kernels."""
    architecture, table = PEERS[cpu]
    flags = ["-O3", "-DNDEBUG", f"-march={architecture}", "-w", "-D_GNU_SOURCE", "-DGGML_USE_CPU_REPACK"]
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
    names = sorted({peer.function for peer in table.values()})
    content = {
        "n": COLUMNS_OF_PEER,
        "k": K,
        "dots": ", ".join(name for name in names if "dot" in name),
        "matrices": ", ".join(name for name in names if "dot" not in name),
        "calls": "\n    ".join(peer.call() for peer in table.values()),
    }
    (work / "main.c").write_text(MAIN % content)
    program = work / "peers"
    link = ["-O2", "-w", "-static", work / "main.c", *objects, "-o", program, "-lm", "-lstdc++", "-lpthread"]
    # What the kernels do not call of ggml stays unresolved.
    subprocess.run(["aarch64-linux-gnu-gcc", *link, "-Wl,--unresolved-symbols=ignore-all"], check=True)
    printed = count(program, work, cpu)
    return {name: printed[peer.function] / (K * COLUMNS_OF_PEER * peer.rows) for name, peer in table.items()}


def count(program: Path, work: Path, cpu: str) -> dict[str, int]:
    import qcompile.codegen.kernels.arm.harness as harness

    plugin = work / "count.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", plugin, harness.HERE / "count.c"], check=True)
    qemu, *rest = arm.emulator(get_target(cpu))
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
        ggml = arguments.ggml or (None if arguments.no_peers else download(work))
        for cpu in arguments.cpu:
            reference = peers(ggml, work, cpu) if ggml is not None and cpu in PEERS else {}
            for name, value in reference.items():
                print(f"  {cpu:12} llama.cpp {name:22} {value:.4f}")
            for spelling, m, value, kernel in ours(cpu, arguments.formats, arguments.rows, arguments.family):
                against = "".join(
                    f"  {value / reference[name]:.2f}x {name}" for name in _compared(spelling, m) if name in reference
                )
                print(f"  {cpu:12} {spelling:16} M={m:<3} {value:.4f}  {kernel}{against}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compared(spelling: str, m: int) -> list[str]:
    """Peers of a format: for more rows those that share the work among them, or the same as for one where there are none."""
    table = {"int2": ["Q2_K", "TQ2_0"], "tern": ["Q2_K", "TQ2_0"], "int3": ["Q3_K"], "int8": ["Q8_0"]}
    found = table.get(spelling[:4], ["Q4_0", "Q4_0 repacked", "Q4_K"] if spelling.startswith("int4") else [])
    if m == 1:
        return found
    some = [f"{name}, {rows} rows" for name in found for rows in (2, 16)]
    return some if spelling.startswith("int4") else [*found, *some]


if __name__ == "__main__":
    main()
