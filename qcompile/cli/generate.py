"""``qcompile generate``."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.argument("artifact")
@click.argument("prompt", required=False)
@click.option("--file", "source", type=click.Path(), help="Read the prompt from this text file; - is standard input.")
@click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True, help="Write at most as many tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from as many likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the fewest with this probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
@click.option("--threads", type=int, help="Threads to use; all cores by default.")
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and times as JSON, at the end.")
def generate(
    artifact: str,
    prompt: str | None,
    source: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with ARTIFACT, a decoder that was compiled with --kv-cache."""
    from dataclasses import asdict

    from qcompile.compiled import load
    from qcompile.errors import InputError
    from qcompile.runtime import set_threads

    if (prompt is None) == (source is None):
        raise InputError("give either a prompt or a file with it (`--file`)")
    if source is not None:
        prompt = _content(source)
    model = load(artifact)
    if threads is not None:
        set_threads(threads)
    writing = model.generate(
        prompt or "", max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    pieces = []
    for piece in writing:
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if as_json:
        click.echo(json.dumps({"text": "".join(pieces), "tokens": writing.tokens, **asdict(writing.pace)}))
    else:
        click.echo()
        click.echo(str(writing.pace), err=True)


def _content(source: str) -> str:
    from qcompile.errors import InputError

    try:
        with click.open_file(source, encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source}: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}") from None
