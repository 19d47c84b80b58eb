"""``qcompile compile``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("model")
@click.option("--target", default="native", show_default=True, help="Machine to compile for; see `qcompile targets`.")
@click.option(
    "--cpu", "--arch", "--device", "variant", help="Which machine of the target's kind, e.g. cortex-a76, sm_90a."
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the target's backend.")
@click.option("--pe-budget", type=int, help="FPGA: products formed per cycle, at most.")
@click.option("--target-cycles", type=int, help="FPGA: cycles per frame, at most.")
@click.option("--recipe", default="w8a8", show_default=True, help="Recipe name or .toml file; see `qcompile recipes`.")
@click.option("--calibration", type=click.Path(), help="Samples: .npz, .txt or .jsonl.")
@click.option("--tokenizer", type=click.Path(), help="tokenizer.json; found by itself in a model directory.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory of the artifact.")
@click.option("--force", "--overwrite", "force", is_flag=True, help="Replace an artifact that is there already.")
@click.option("--weight", help="Change the recipe's weight format, e.g. int4/g128.")
@click.option("--activation", help="Change the recipe's activation format: int8/token, int8/tensor or none.")
@click.option("--solver", help="Change the recipe's solver.")
@click.option(
    "--max-samples", type=click.IntRange(1), default=256, show_default=True, help="Calibration samples used at most."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Texts are cut at this length."
)
@click.option("--kv-cache", is_flag=True, help="Capture a decoder with past keys and values as inputs.")
@click.option("--keep-stages", type=click.Path(), help="Write the model after every stage into this directory.")
@click.option("--emit", multiple=True, help="Also write other forms: mlir (the stages), and what the target has.")
@click.option("--no-proof", is_flag=True, help="Do not check the analysis of channel spaces on this model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def compile(
    model: str,
    target: str,
    variant: str | None,
    options: tuple[str, ...],
    pe_budget: int | None,
    target_cycles: int | None,
    recipe: str,
    calibration: str | None,
    tokenizer: str | None,
    output: str,
    force: bool,
    weight: str | None,
    activation: str | None,
    solver: str | None,
    max_samples: int,
    max_tokens: int,
    kv_cache: bool,
    keep_stages: str | None,
    emit: tuple[str, ...],
    no_proof: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL: an ONNX file, a Hugging Face directory, or package:attribute naming a torch module."""
    from qcompile.compiler import compile as compile_model
    from qcompile.report.table import print_report

    result = compile_model(
        model,
        target=target,
        variant=variant,
        options=dict(_option(text) for text in options)
        | {k: str(v) for k, v in (("pe-budget", pe_budget), ("target-cycles", target_cycles)) if v is not None},
        recipe=recipe,
        calibration=calibration,
        tokenizer=tokenizer,
        output=output,
        overwrite=force,
        keep_stages=keep_stages,
        emit=emit,
        max_samples=max_samples,
        max_tokens=max_tokens,
        capture_options={"kv_cache": True} if kv_cache else {},
        prove=not no_proof,
        progress=False if quiet or as_json else None,
        weight=weight,
        activation=activation,
        solver=solver,
    )
    if as_json:
        click.echo(json.dumps({"path": str(result.path), **result.report.to_dict()}))
    else:
        print_report(result.report, result.size)
        click.echo(f"artifact: {result.path}")


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not of the form NAME=VALUE")
    return name, value
