"""The recipes that ship with qcompile."""

from typing import Any

from qcompile.recipes.recipe import Recipe, Step, register_recipe

SMOOTH = Step("smooth", {"alpha": 0.5})
ROTATE = Step("rotate-online", {"block": 128, "everywhere": True})

register_recipe(
    Recipe(
        "float",
        "No quantization: the float model through the same compiler.",
        weight="none",
        activation="none",
        embedding_bits=0,
    )
)
register_recipe(
    Recipe(
        "w8a8",
        "Weights int8 per channel; smoothed, inputs rotated by Hadamard blocks and quantized to int8 per token.",
        "Xiao et al., SmoothQuant (2022)",
        solver="mse",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w8a8-static",
        "Weights int8 per channel, smoothed; inputs rotated and quantized with one calibrated scale per tensor.",
        "Xiao et al., SmoothQuant (2022)",
        activation="int8/tensor",
        solver="mse",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w4a8",
        "Weights int4 in groups of 32 by GPTQ; smoothed, inputs rotated by Hadamard blocks and quantized to int8 per token.",
        "Frantar et al., GPTQ (2022)",
        weight="int4/g32",
        solver="gptq",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w4a8-g128",
        "Weights int4 in groups of 128 by GPTQ; smoothed, inputs rotated by Hadamard blocks and quantized to int8 per token.",
        "Frantar et al., GPTQ (2022)",
        weight="int4/g128/asym",
        solver="gptq",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w4a4",
        "Weights int4 in groups of 32 by GPTQ; whole rows rotated with random signs, tokens clipped and quantized to int4.",
        "Ashkboos et al., QuaRot (2024)",
        weight="int4/g32",
        activation="int4/token",
        solver="gptq",
        transforms=(Step("rotate"), Step("rotate-online", {"everywhere": True, "signs": True}), Step("clip")),
    )
)
register_recipe(
    Recipe(
        "w3a8",
        "Weights int3 in groups of 32 by GPTQ, activations int8 per token.",
        weight="int3/g32/asym",
        solver="gptq",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w2a8",
        "Weights int2 in groups of 32 by GPTQ, activations int8 per token.",
        weight="int2/g32/asym",
        solver="gptq",
        transforms=(SMOOTH, ROTATE),
    )
)
register_recipe(
    Recipe(
        "w4a16",
        "Weights int4 in groups of 128 by GPTQ, float activations.",
        weight="int4/g128/asym",
        activation="none",
        solver="gptq",
    )
)
register_recipe(Recipe("w8a16", "Weights int8 per channel, float activations.", activation="none", solver="mse"))
register_recipe(
    Recipe(
        "w8a8-rtn",
        "Weights int8 per channel rounded to nearest, activations int8 per token; no calibration data needed.",
    )
)
register_recipe(
    Recipe(
        "w4a8-rtn",
        "Weights int4 in groups of 32 rounded to nearest, activations int8 per token; no data needed.",
        weight="int4/g32/asym",
    )
)

W4A4: dict[str, Any] = {
    "weight": "int4/g128/asym",
    "activation": "int4/token",
    "solver": "gptq",
    "hessian": "corrected",
}
"""Four bits everywhere: weights by GPTQ, layer by layer behind the layers quantized before."""

register_recipe(
    Recipe(
        "smoothquant",
        "Weights and activations int8; activation outliers moved into the weights.",
        "Xiao et al., SmoothQuant (2022)",
        solver="mse",
        transforms=(SMOOTH,),
    )
)
register_recipe(
    Recipe(
        "quarot",
        "W4A4: random Hadamard rotations, folded where possible, tokens clipped.",
        "Ashkboos et al., QuaRot (2024)",
        transforms=(Step("rotate"), Step("rotate-online"), Step("clip")),
        **W4A4,
    )
)
register_recipe(
    Recipe(
        "spinquant",
        "W4A4: rotations learned on calibration samples.",
        "Liu et al., SpinQuant (2024)",
        transforms=(Step("spinquant"),),
        **W4A4,
    )
)
register_recipe(
    Recipe(
        "ostquant",
        "W4A4: rotations and scales learned together on calibration samples.",
        "Hu et al., OSTQuant (2025)",
        transforms=(Step("ostquant"),),
        **W4A4,
    )
)
register_recipe(
    Recipe(
        "flatquant",
        "W4A4: Kronecker products at run time, scales and matrices of heads, learned on calibration samples.",
        "Sun et al., FlatQuant (2024)",
        transforms=(Step("flatquant"),),
        **W4A4,
    )
)
register_recipe(
    Recipe(
        "fixed-w4a8",
        "For hardware without floats: weights int4 per channel by GPTQ, every activation int8 with one calibrated scale.",
        weight="int4",
        activation="int8/tensor",
        solver="gptq",
        embedding_bits=0,
    )
)
register_recipe(
    Recipe(
        "fixed-w8a8",
        "For hardware without floats: weights int8 per channel, every activation int8 with one calibrated scale.",
        activation="int8/tensor",
        solver="mse",
        embedding_bits=0,
    )
)
