"""The recipes that ship with qcompile."""

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
