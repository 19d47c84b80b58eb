"""Numbers of hls4ml's C simulation for a chain of integer layers, for `benchmarks/fpga.py`; needs hls4ml, torch and g++.

    python hls4ml_numbers.py LAYERS.npz FOLDER

``LAYERS.npz`` as `da4ml_rtl.py` takes it. Integers become fixed-point numbers without fraction; after a shift by ``s`` the
activations stand for multiples of ``2^s``, and the biases that follow are multiplied to match.
"""

import sys
from pathlib import Path

import hls4ml
import numpy as np
import torch
from torch import nn


def main(layers: str, folder: str) -> None:
    """Convert, compile, run."""
    given = np.load(layers)
    x = given["x"].astype(np.float32)
    modules, exponent, i = [], 0, 0
    precisions = {}
    while f"w{i}" in given:
        weight, bias, shift = given[f"w{i}"], given[f"b{i}"], int(given[f"s{i}"])
        linear = nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T.astype(np.float32)))
            linear.bias.copy_(torch.from_numpy(bias.astype(np.float32)) * 2.0**exponent)
        modules.append(linear)
        wide = f"ap_fixed<{32 + exponent},{32 + exponent}>"
        precisions[len(modules) - 1] = {"weight": "ap_fixed<4,4>", "bias": wide, "accum": wide, "result": wide}
        if shift >= 0:
            exponent += shift
            modules.append(nn.ReLU())
            precisions[len(modules) - 1] = {"result": f"ap_ufixed<8,{8 + exponent},AP_RND,AP_SAT>"}
        i += 1
    model = nn.Sequential(*modules).eval()
    config = hls4ml.utils.config_from_pytorch_model(model, (x.shape[1],), granularity="name", backend="Vitis")
    for name, entry in config["LayerName"].items():
        if name.startswith("_") or name.lstrip("_").isdigit():
            index = int(name.strip("_").split("_")[0])
            if isinstance(entry.get("Precision"), dict):
                entry["Precision"].update(precisions[index])
            else:
                entry["Precision"] = precisions[index]["result"]
        else:
            entry["Precision"] = {"result": "ap_fixed<8,8>"}
    converted = hls4ml.converters.convert_from_pytorch_model(
        model, hls_config=config, output_dir=folder, backend="Vitis", io_type="io_parallel"
    )
    converted.compile()
    y = np.asarray(converted.predict(x)).reshape(len(x), -1) / 2.0**exponent
    np.save(Path(folder) / "y.npy", y)


if __name__ == "__main__":
    main(*sys.argv[1:])
