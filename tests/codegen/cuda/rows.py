"""Kernels of single rows on a CPU: the generated source over `rows.h` instead of PTX, a thread of the operating system for each of
a block. Row kernels, and products of one row (`sliced`)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np

from qcompile.codegen.kernels.cuda.persistent import PersistentShape
from qcompile.codegen.kernels.cuda.plan import Plan
from qcompile.codegen.kernels.cuda.rowwise import CudaRowwise, source
from qcompile.codegen.kernels.cuda.sliced import SlicedShape
from qcompile.formats import Quantized
from qcompile.targets.cuda import TARGETS

from .blocks import _aligned

BODIES = {
    "mbarrier.init": "phases({0}).start({1});",
    "mbarrier.arrive.expect_tx": "phases({0}).arrive({1});",
    "mapa": "{0} = ({1} & 0xffffff) | ({2} + 1) << 24;",
    "st.async": "memcpy(place({0}, 4), &{1}, 4); phases({2}).complete(4);",
    "barrier.cluster.arrive": "arrived = everyone->arrive();",
    "barrier.cluster.wait": "everyone->wait(std::move(*arrived)); arrived.reset();",
    "cp.async.bulk.shared": 'require({2} % 16 == 0 && (uintptr_t){1} % 16 == 0, "bulk copy");'
    " memcpy(place({0}, 16), {1}, {2}); phases({3}).complete({2});",
    r"cp.async.c[ag].*, (?P<number>\d+);": "copy_async({0}, {1}, {number});",
    "cp.async.commit": "close_group();",
    r"cp.async.wait_group (?P<number>\d+)": "await_groups({number});",
    "ld.global.b32": "memcpy(&{0}, {1}, 4);",
    "ld.shared.v2": "uint words[2]; memcpy(words, place({2}, 8), 8); {0} = words[0]; {1} = words[1];",
    "ld.shared.b32": "memcpy(&{0}, place({1}, 4), 4);",
    "ld.global.(nc.)?v4": "memcpy(&{0}, {4}, 4); memcpy(&{1}, (uint*){4} + 1, 4); memcpy(&{2}, (uint*){4} + 2, 4);"
    " memcpy(&{3}, (uint*){4} + 3, 4);",
    "ld.global.nc.v2": "memcpy(&{0}, {2}, 4); memcpy(&{1}, (uint*){2} + 1, 4);",
    "ld.global.nc.b32": "memcpy(&{0}, {1}, 4);",
    "ld.shared.v4": "uint words[4]; memcpy(words, place({4}, 16), 16);"
    " {0} = words[0]; {1} = words[1]; {2} = words[2]; {3} = words[3];",
    "st.shared.v4": "const uint words[] = {{{1}, {2}, {3}, {4}}}; memcpy(place({0}, 16), words, 16);",
    "st.shared.v2": "const uint words[] = {{{1}, {2}}}; memcpy(place({0}, 8), words, 8);",
    "st.shared.b32": "memcpy(place({0}, 4), &{1}, 4);",
    "st.shared.b16": "memcpy(place({0}, 2), &{1}, 2);",
    "st.global.v4": "const uint words[] = {{{1}, {2}, {3}, {4}}}; memcpy((void*){0}, words, 16);",
    "st.global.v2": "const uint words[] = {{{1}, {2}}}; memcpy((void*){0}, words, 8);",
    "st.global.b32": "memcpy((void*){0}, &{1}, 4);",
    "ldmatrix.*x4.trans": "uint w[4]; load_matrices(w, {4}, true); {0} = w[0]; {1} = w[1]; {2} = w[2]; {3} = w[3];",
    "ldmatrix.*x4.shared": "uint w[4]; load_matrices(w, {4}, false); {0} = w[0]; {1} = w[1]; {2} = w[2]; {3} = w[3];",
    "stmatrix.*x4.shared": "store_matrices({0}, {{{1}, {2}, {3}, {4}}});",
    "mma.*f32.f16.f16.f32": "float sums[] = {{{10}, {11}, {12}, {13}}};"
    " product(sums, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}});"
    " {0} = sums[0]; {1} = sums[1]; {2} = sums[2]; {3} = sums[3];",
    "mma.*f16.f16.f16.f16": "float sums[] = {{part({8}, 0), part({8}, 1), part({9}, 0), part({9}, 1)}};"
    " product(sums, {{{2}, {3}, {4}, {5}}}, {{{6}, {7}}}); {0} = pair(sums[1], sums[0]); {1} = pair(sums[3], sums[2]);",
    "mma.*s32.u8.s8.s32": "uint sums[] = {{{10}, {11}, {12}, {13}}};"
    " product(sums, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}});"
    " {0} = sums[0]; {1} = sums[1]; {2} = sums[2]; {3} = sums[3];",
    "redux.sync.max.u32": "{0} = __reduce_max_sync(0, {1});",
    "shfl.sync.bfly": "{0} = exchanged({1}, lane() ^ {2});",
    "cvt.rni.s32.f32": "{0} = (uint)(int)rintf({1});",
    "fma.rn.f16x2": "{0} = pairwise([&](int i) {{ return part({1}, i) * part({2}, i) + part({3}, i); }});",
    "mul.rn.f16x2": "{0} = pairwise([&](int i) {{ return part({1}, i) * part({2}, i); }});",
    "add.rn.f16x2": "{0} = pairwise([&](int i) {{ return part({1}, i) + part({2}, i); }});",
    "sub.rn.f16x2": "{0} = pairwise([&](int i) {{ return part({1}, i) - part({2}, i); }});",
    "cvt.rn.f16x2": "{0} = pair({1}, {2});",
    "lop3.*, 234;": "{0} = {1} & {2} | {3};",
    "prmt": "{0} = permuted({1}, {2}, {3});",
    "max.NaN.f32": "{0} = largest({1}, {2});",
    "fma.rn.f32": "{0} = fmaf({1}, {2}, {3});",
    "div.rn.f32": "{0} = {1} / {2};",
    "rcp.approx": "{0} = 1 / {1};",
    "fence|griddepcontrol|prefetch": "",
}
"""What an instruction does, by how it begins, in terms of its operands; nothing where it orders what is ordered here."""

HELPER = re.compile(r"^__forceinline__ __device__ (.+?) (\w+)\(([^)]*)\)\s*\{(.*?)\}\n", re.S | re.M)
REDUCTION = re.compile(r"^template <typename T>\n__forceinline__ __device__ (T \w+\(.*?\n\})", re.S | re.M)


def run(kernel: CudaRowwise, arrays: dict[str, np.ndarray], rows: int, grid: int, folder: Path) -> None:
    """Execute a row kernel with a config on ``arrays`` by name of the parameter, in place; ``grid`` blocks or clusters."""
    text = source({"k": kernel}, TARGETS["sm_90a"]).read_text()
    size = (1, kernel.shares)
    execute(text, "k", arrays, rows, (grid, kernel.shares), size, kernel.threads, kernel.shared_bytes, folder)


def multiply(plan: Plan, weight: Quantized, x: np.ndarray, bias: np.ndarray | None, folder: Path) -> np.ndarray:
    """The first kernel of ``plan``, of `sliced` or `persistent`, on ``x`` (1, K) float16; float16 (1, N)."""
    s, packed = plan.shape(), plan.pack(weight)
    padded = np.zeros((len(x), s.x_width), np.float16)
    padded[:, : x.shape[1]] = x
    arrays = {"x": padded, "meta": packed.get("meta", np.zeros(0, np.uint8)), "column": packed["column"]}
    codes = [packed[key] for key in ("codes", "high") if key in packed]
    if "table" in packed:
        arrays["table"] = packed["table"]
    arrays |= {f"codes{i}": array for i, array in enumerate(codes)} | ({"bias": bias} if bias is not None else {})
    arrays["out"] = np.full((len(x), s.n), 7, np.float16)
    assert isinstance(s, SlicedShape | PersistentShape) and len(x) == 1
    grid, size = (s.launched if isinstance(s, PersistentShape) else s.grid_n, s.split), (1, s.split)
    execute(plan.source().read_text(), plan.entries[0].symbol, arrays, 1, grid, size, s.threads, s.shared_bytes, folder)
    return arrays["out"]


def execute(
    text: str,
    name: str,
    arrays: dict[str, np.ndarray],
    rows: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    threads: int,
    shared: int,
    folder: Path,
) -> None:
    """A kernel of a source on ``arrays`` by name of the parameter, in place; clusters are ``size`` blocks of the grid."""
    end = text.index("#include <tvm/ffi")
    start = text.rindex('extern "C" __global__', 0, end)
    body, before = text[start:end], text[: text.index('extern "C" __global__')]
    parameters = re.search(rf"{name}_kernel\((.*?)\)\s*\{{", body, re.S)
    assert parameters is not None
    body = re.sub(rf'extern "C" __global__ void.*?(?={name}_kernel\()', "static void ", body, count=1)
    body = re.sub(r"extern __shared__[^;]* (\w+)\[\];", r"uchar* \1 = here().shared;", body).replace("__restrict__", "")
    helpers = [f"template <typename T> static {found}" for found in REDUCTION.findall(before)]
    found = (m.groups() for m in HELPER.finditer(before) if m[1] != "T" and f"{m[2]}(" in body)
    helpers += [_helper(*groups) for groups in found]
    aligned = {f"{name}_ptr": _aligned(array) for name, array in arrays.items()}
    order, values = list(aligned), []
    for parameter in parameters[1].split(","):
        kind, name_ = parameter.strip().rsplit(None, 1)
        pointer = f"({kind.replace('__restrict__', '')})given[{order.index(name_)}]" if "*" in kind else ""
        values.append(
            pointer or ("rows" if name_ == "v" else "grid")
        )  # what else it takes is how many rows are launched
    program = f"""#include "{Path(__file__).with_name("rows.h")}"
{chr(10).join(helpers)}
{body}
extern "C" int run(uchar** given, int rows, int grid) {{
  launch({{grid, {grid[1]}, 1}}, {{{size[0]}, {size[1]}, 1}}, {threads}, {threads}, {shared},
         [=] {{ {name}_kernel({", ".join(values)}); }});
  return 0;
}}
"""
    folder.mkdir(exist_ok=True)
    file, library = folder / "kernel.cpp", folder / "kernel.so"
    file.write_text(program)
    options = ["-O1", "-w", "-std=c++20", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing"]
    subprocess.run(["g++", *options, "-o", str(library), str(file)], check=True)
    pointers = (ctypes.c_void_p * len(aligned))(*[a.ctypes.data for a in aligned.values()])
    assert ctypes.CDLL(str(library)).run(pointers, rows, grid[0]) == 0
    for array, result in zip(arrays.values(), aligned.values()):
        array.view(np.uint8).reshape(-1)[:] = result


def _helper(result: str, name: str, parameters: str, code: str) -> str:
    """A function of the source with a body of `BODIES`."""
    names = [p.split()[-1].lstrip("&*") for p in parameters.split(",")] if parameters.strip() else []
    asm = re.search(r'asm(?: volatile)?\("(.*?)"', code)
    if name.endswith("cvta_generic_to_shared"):
        code = "return (uchar*)p - here().shared;"
    elif name.endswith("mbarrier_wait"):
        code = f"phases((uchar*){names[0]} - here().shared).wait({names[1]});"
    elif name.endswith("warp_sync"):
        code = "warp_sync();"
    elif name.endswith("cta_sync"):
        code = "here().named->arrive_and_wait();"
    elif asm is not None:
        guarded = re.match(r"\{ .reg .pred p; .*? @p (.*) \}$", asm[1])
        instruction = guarded[1] if guarded else asm[1]
        matches = ((body, re.match(start, instruction)) for start, body in BODIES.items())
        body, match = next(((body, match) for body, match in matches if match), ("", None))
        assert match, f"there is nothing for {instruction}"
        code = body.format(*names, **match.groupdict())
        code = f"if ({names[-1]}) {{ {code} }}" if guarded else code
    return f"static {result} {name}({parameters}) {{ {code} }}"
