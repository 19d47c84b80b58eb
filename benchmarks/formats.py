"""Every weight format on all-MiniLM-L6-v2: kernel, size, and the quality of the compiled program.

    python benchmarks/formats.py                               the formats below, with the transforms and solver of w4a8
    python benchmarks/formats.py --weight nf4/g64 --recipe w4a8-rtn

`cosine` compares sentence embeddings of program and float model on held-out sentences; `to onnx` is the relative difference
between the program and `model.onnx` in ONNX Runtime, which read the same bytes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import click

import qcompile
from qcompile.capture import capture
from qcompile.demo import bundled, cosine_to_float, minilm_directory
from qcompile.passes.recognise import recognise

FORMATS = [
    *(
        "int8",
        "fixed<8>",
        "nf8/g32",
        "mxfp8",
        "fp8/g32",
        "e5m2/g32",
        "pow2sum2/g32",
        "mxfp6",
        "fp6/g32",
        "nf6/g32",
        "nf5/g32",
    ),
    *("int6/g32", "int5/g32", "int4/g32", "dual4/g32", "nf4/g32", "fp4/g32", "mxfp4", "nvfp4"),
    *("codebook4/g32", "pow2sum1/g32", "bitplane4/g32", "int3/g32", "bitplane3/g32", "codebook3/g32", "int2/g32"),
    *("ternary/g32", "bitplane2/g32", "codebook2/g32"),
]


@click.command()
@click.option("--weight", "weights", multiple=True, default=FORMATS)
@click.option("--recipe", default="w4a8", help="Transforms, solver and activations.")
@click.option("--samples", default=48, help="Calibration samples.")
@click.option("--sentences", default=100, help="Held-out sentences compared.")
def main(weights: tuple[str, ...], recipe: str, samples: int, sentences: int) -> None:
    """Print the table as Markdown."""
    captured = capture(minilm_directory(), check=False)
    graph = recognise(captured.model)[0]
    print("| format | bits per weight | linear kernels | MB | cosine mean | lowest | to onnx |")
    print("|---|---|---|---|---|---|---|")
    for weight in weights:
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            model = qcompile.compile(
                captured.model,
                recipe=recipe,
                weight=weight,
                calibration=bundled("calibration_sentences.txt"),
                tokenizer=captured.tokenizer,
                max_samples=samples,
                output=Path(folder) / "out",
                progress=False,
            )
            some = Path(folder) / "some.txt"
            some.write_text("\n".join(bundled("heldout_sentences.txt").read_text().splitlines()[:sentences]))
            quality, size = cosine_to_float(model, graph, captured.tokenizer, some), model.size
        linears = [layer for layer in model.report.layers if layer.kind == "linear"]
        bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in linears)
        count = sum(layer.shape[0] * layer.shape[1] for layer in linears)
        kernels = ", ".join(f"{name} ({n})" for name, n in Counter(layer.kernel for layer in linears).most_common())
        print(
            f"| `{weight}` | {bits / count:.2f} | {kernels} | {size / 1e6:.1f} | {quality['mean']:.4f} "
            f"| {quality['lowest']:.4f} | {model.report.quality['program_to_onnx_error']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
