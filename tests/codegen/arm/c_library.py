"""Compile a C library with a small program around it, and run it: natively, or for ARM under qemu."""

import json
import subprocess
from pathlib import Path

import numpy as np

from qcompile.backends.emulate import read_tensors, write_tensors
from qcompile.codegen.cexport.emit import c_fields
from qcompile.targets import arm

MAIN = """
#include "NAME.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static uint64_t word(FILE *f) { uint64_t v; if (fread(&v, 8, 1, f) != 1) exit(3); return v; }
static char *memory(size_t n) { char *p = aligned_alloc(64, (n / 64 + 1) * 64); if (!p) exit(3); return p; }
int main(int argc, char **argv) {
    if (argc != 4) return 2;
    FILE *f = fopen(argv[1], "rb");
    if (!f) return 2;
    char *weights = memory(NAME_WEIGHTS_BYTES);
    if (fread(weights, 1, NAME_WEIGHTS_BYTES, f) != NAME_WEIGHTS_BYTES) return 3;
    fclose(f);
    f = fopen(argv[2], "rb");
    int64_t shape[INPUTS][8] = {0};
    void *data[INPUTS];
    if (!f || word(f) != INPUTS) return 2;
    for (int i = 0; i < INPUTS; i++) {
        word(f);
        size_t bytes = word(f) / 8, rank = word(f);
        for (size_t j = 0; j < rank; j++) bytes *= shape[i][j] = word(f);
        data[i] = memory(bytes);
        if (fread(data[i], 1, bytes, f) != bytes) return 3;
    }
    NAME_extents e = {EXTENTS};
    NAME_inputs in = {INPUT_FIELDS};
    NAME_outputs out = {OUTPUT_FIELDS};
    size_t size = NAME_workspace_bytes(&e);
    char *workspace = memory(size + 64);
    memset(workspace, 0x7f, size + 64);
    int status = NAME_run(&e, weights, &in, &out, workspace);
    for (int i = 0; i < 64; i++)
        if (workspace[size + i] != 0x7f) { puts("wrote past the workspace"); return 9; }
    if (status) { puts(NAME_message(status)); return 1; }
    FILE *r = fopen(argv[3], "wb");
    WRITE
    return fclose(r) != 0;
}
"""


class CLibrary:
    """The C library of an artifact whose extents are named like the symbolic axes of its inputs."""

    def __init__(self, artifact: Path, name: str, work: Path, target=None) -> None:
        program = json.loads((artifact / "program.json").read_text())
        self.inputs, self.outputs = program["inputs"], program["outputs"]
        fields = {s["name"]: field for s, field in zip(self.inputs, c_fields([s["name"] for s in self.inputs]))}
        fields |= {s["name"]: field for s, field in zip(self.outputs, c_fields([s["name"] for s in self.outputs]))}
        folder, self.work = artifact / "c", work
        axes = {}
        for i, spec in enumerate(self.inputs):
            for j, extent in enumerate(spec["shape"]):
                if isinstance(extent, str):
                    axes.setdefault(extent, f"shape[{i}][{j}]")
        write = "".join(
            f"fwrite(out.{fields[s['name']]}, 1, NAME_{fields[s['name']]}_bytes(&e), r);" for s in self.outputs
        )
        text = MAIN.replace("INPUTS", str(len(self.inputs))).replace("WRITE;", write).replace("WRITE\n", write + "\n")
        text = text.replace("EXTENTS", ", ".join(f".{n} = {at}" for n, at in axes.items()) or "0")
        text = text.replace(
            "INPUT_FIELDS", ", ".join(f".{fields[s['name']]} = data[{i}]" for i, s in enumerate(self.inputs))
        )
        made = ", ".join(
            f".{fields[s['name']]} = (void *)memory(NAME_{fields[s['name']]}_bytes(&e))" for s in self.outputs
        )
        text = text.replace("OUTPUT_FIELDS", made).replace(f"NAME_{len(self.inputs)}", "NAME_INPUTS")
        (work / "main.c").write_text(text.replace("NAME", name))
        self.program, self.weights = work / "main", folder / "weights.bin"
        sources = [work / "main.c", folder / f"{name}.c", folder / "kernels.o"]
        strict = ["-std=c99", "-D_ISOC11_SOURCE", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1"]
        if target is None:
            self.command = [self.program]
            subprocess.run(["cc", *strict, "-I", folder, *sources, "-o", self.program, "-lm"], check=True)
        else:
            self.command = [*arm.emulator(target), self.program]
            cc = arm.static_compiler(target)
            cc.run(*strict, *cc.static, "-I", folder, *sources, "-o", self.program, "-lm")

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Outputs as flat arrays. An input the library refuses raises ValueError."""
        write_tensors(self.work / "arguments", list(arrays))
        done = subprocess.run(
            [*self.command, self.weights, self.work / "arguments", self.work / "results"],
            capture_output=True,
            text=True,
        )
        if done.returncode == 1:
            raise ValueError(done.stdout.strip())
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        data, found = (self.work / "results").read_bytes(), []
        sizes = {
            v: a.shape[j] for s, a in zip(self.inputs, arrays) for j, v in enumerate(s["shape"]) if isinstance(v, str)
        }
        for spec in self.outputs:
            shape = [eval(e, {}, sizes) if isinstance(e, str) else e for e in spec["shape"]]
            size = int(np.prod(shape)) * np.dtype(spec["dtype"]).itemsize
            found.append(np.frombuffer(data[:size], spec["dtype"]).reshape(shape))
            data = data[size:]
        assert not data
        return found


__all__ = ["CLibrary", "read_tensors"]
