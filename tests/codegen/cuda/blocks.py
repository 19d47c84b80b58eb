"""Kernels that share rows (`shared`) on a CPU: the generated source over `blocks.h` instead of PTX."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np

from qcompile.codegen.kernels.cuda.plan import Plan
from qcompile.formats import Quantized

BODIES = {
    "mbarrier.init": "phases({0}).start({1});",
    "mbarrier.arrive.expect_tx": "phases({0}).arrive({1});",
    "mbarrier.arrive.shared": "phases({0}).arrive(0);",
    "cp.async.bulk.tensor.2d.*multicast": "tensor_copy({0}, {1}, {{{2}, {3}}}, {4}, {5});",
    "cp.async.bulk.tensor.2d": "tensor_copy({0}, {1}, {{{2}, {3}}}, {4}, 1u << rank);",
    "cp.async.bulk.tensor.3d": "tensor_copy({0}, {1}, {{{2}, {3}, {4}}}, {5}, 1u << rank);",
    "cp.async.ca": "memcpy(place({0}, 4), {1}, 4);",
    "barrier.cluster.arrive": "arrived = everyone->arrive();",
    "barrier.cluster.wait": "everyone->wait(std::move(*arrived)); arrived.reset();",
    "bar.sync": 'require({1} == (uint)named_threads, "barrier"); here().named->arrive_and_wait();',
    "mapa": "{0} = ({1} & 0xffffff) | ({2} + 1) << 24;",
    "st.async": "const uint words[] = {{{1}, {2}, {3}, {4}}}; memcpy(place({0}, 16), words, 16); phases({5}).complete(16);",
    "ld.shared.v4": "uint words[4]; memcpy(words, place({4}, 16), 16);"
    " {0} = words[0]; {1} = words[1]; {2} = words[2]; {3} = words[3];",
    "stmatrix.*x4.trans": "store_transposed({0}, {{{1}, {2}, {3}, {4}}});",
    "st.global.v4": "const uint words[] = {{{1}, {2}, {3}, {4}}}; memcpy((void*){0}, words, 16);",
    "cvt.rn.f16x2": "{0} = pair({1}, {2});",
}
"""What an instruction does, by how it begins, in terms of its operands; others order what is ordered here."""

HELPER = re.compile(r"__forceinline__ __device__ (void|unsigned int) (\w+)\(([^)]*)\)\s*\{(.*?)\n\}", re.S)


def run(plan: Plan, weight: Quantized, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, folder: Path) -> np.ndarray:
    """The first kernel of ``plan`` on codes ``x`` (M, K) int8 with a scale per row; float16 (M, N)."""
    s, text = plan.shape(), plan.source().read_text()
    name = plan.entries[0].symbol
    end = text.index("#include <tvm/ffi")
    body = text[text.rindex('extern "C" __global__', 0, end) : end]
    parameters = re.search(rf"{name}_kernel\((.*?)\)\s*\{{", body, re.S)
    assert parameters is not None
    body = re.sub(r'extern "C" __global__ void.*?(?=\w+_kernel\()', "static void ", body, count=1)
    body = re.sub(r"extern __shared__[^;]* (\w+)\[\];", r"uchar* \1 = here().shared;", body)
    body = re.sub("__restrict__|__grid_constant__|^#.*$", "", body, flags=re.M)
    helpers = [_helper(*m.groups()) for m in HELPER.finditer(text[:end]) if f"{m[2]}(" in body]
    # The host's description of tensors, as it is.
    maps = text[text.index("alignas(64) CUtensorMap") : text.index("auto cuda_arg = ")]
    packed = plan.pack(weight)
    padded = np.zeros((len(x), s.x_width), np.int8)
    padded[:, : x.shape[1]] = x
    arrays = {"x": padded, "x_scale": scale, "codes0": packed["codes"], "column": packed["column"], "bias": bias}
    arrays["out"] = np.full((len(x), s.n), 7, np.float16)
    aligned = {key: _aligned(array) for key, array in arrays.items()}
    rows = -(-len(x) // s.rows)
    values = [_value(p.strip(), text) for p in parameters[1].split(",")]
    declared = "\n  ".join(f"uchar* {key} = given[{i}];" for i, key in enumerate(arrays))
    size, grid = s.blocks_of_cluster, (rows * s.blocks_along_n, s.split)
    program = f"""#include "{Path(__file__).with_name("blocks.h")}"
{chr(10).join(helpers)}
{body}
extern "C" int run(uchar** given, int v) {{
  {declared}
  {maps}
  launch({{{grid[0]}, {grid[1]}, 1}}, {{{size[0]}, {size[1]}, 1}}, {s.launched}, {s.threads}, {s.shared_bytes},
         [=] {{ {name}_kernel({", ".join(values)}); }});
  return 0;
}}
"""
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(program)
    options = ["-O1", "-w", "-std=c++20", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing"]
    subprocess.run(["g++", *options, "-o", str(library), str(source)], check=True)
    pointers = (ctypes.c_void_p * len(aligned))(*[a.ctypes.data for a in aligned.values()])
    assert ctypes.CDLL(str(library)).run(pointers, len(x)) == 0
    return aligned["out"].view(np.float16).reshape(len(x), s.n)


def _helper(result: str, name: str, parameters: str, code: str) -> str:
    """A function of the source with a body of `BODIES`."""
    names = [p.split()[-1].lstrip("&*") for p in parameters.split(",")] if parameters.strip() else []
    asm = re.search(r'"(.*?)"', code)
    if "cvta" in name:
        inside = "return (uchar*)p - here().shared;"
    elif name.endswith("warp_sync"):
        inside = "warp_sync();"
    elif name.endswith("mbarrier_wait"):
        inside = f"phases((uchar*){names[0]} - here().shared).wait({names[1]});"
    elif "wgmma_int" in name:
        count = len(names) - 6
        sums = ", ".join(f"&{n}" for n in names[:count])
        inside = f"wgmma({{{sums}}}, {{{', '.join(names[count : count + 4])}}}, {names[-2]}, {names[-1]});"
    else:
        assert asm is not None
        found = (body for start, body in BODIES.items() if re.match(start, asm[1]))
        inside = next(found, "").format(*names)
    return f"static {'void' if result == 'void' else 'uint'} {name}({parameters}) {{ {inside} }}"


def _value(parameter: str, text: str) -> str:
    """What the host passes for a parameter of the kernel."""
    kind, name = parameter.rsplit(None, 1)
    if "CUtensorMap" in kind:
        return f"*{name}"
    if "*" in kind:
        return f"({kind.replace('__restrict__', '')}){name.removesuffix('_ptr')}"
    computed = re.search(rf"int32_t {name} = (.*?);", text)
    return computed[1] if computed and name != "v" else name


def _aligned(array: np.ndarray) -> np.ndarray:
    """Its bytes, aligned as memory of a device is."""
    room = np.zeros(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    room[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return room[start : start + array.nbytes]
