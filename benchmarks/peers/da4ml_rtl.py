"""Verilog of da4ml for a chain of integer layers, for `benchmarks/fpga.py`; runs under a Python that has da4ml.

    python da4ml_rtl.py LAYERS.npz FOLDER CUTOFF

``LAYERS.npz`` holds ``w0, b0, s0, w1, ...``: int weights ``(K, N)``, biases, and the shift after each layer, half up, to 8 bits
unsigned; -1 for none. ``x`` are vectors. The folder receives the Verilog and ``y.npy``, what da4ml's interpreter makes of ``x``.
"""

import sys
from pathlib import Path

import numpy as np
from da4ml.codegen import RTLModel
from da4ml.trace import FixedVariableArrayInput, HWConfig, comb_trace


def main(layers: str, folder: str, cutoff: str) -> None:
    """Trace, write, run."""
    given = np.load(layers)
    x = given["x"]
    inputs = FixedVariableArrayInput(x.shape[1], HWConfig(1, -1, -1)).quantize(1, 7, 0)
    h, i = inputs, 0
    while f"w{i}" in given:
        h = h @ given[f"w{i}"].astype(np.float32) + given[f"b{i}"].astype(np.float32)
        shift = int(given[f"s{i}"])
        if shift >= 0:
            h = h.quantize(0, 8 + shift, -shift, "SAT", "RND") * 2.0**-shift
        i += 1
    logic = comb_trace(inputs, h)
    model = RTLModel(logic, "peer", folder, latency_cutoff=float(cutoff), print_latency=False)
    model.write()
    np.save(Path(folder) / "y.npy", logic.predict(x.astype(np.float64)))
    print(str(model).replace("\n", "; "))


if __name__ == "__main__":
    main(*sys.argv[1:])
