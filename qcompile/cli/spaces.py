"""``qcompile spaces``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("model")
@click.option("--prove", is_flag=True, help="Fold a random element of all groups in float64 and compare the outputs.")
@click.option("--each", is_flag=True, help="With --prove: every space alone too, to find one at fault.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random element and inputs.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def spaces(context: click.Context, model: str, prove: bool, each: bool, seed: int, as_json: bool) -> None:
    """Show where transformations fold into MODEL, what stands in the way, and what the rest would cost at run time.

    A space is a set of channels that share one basis; its group is what may act on it without changing the function:
    S permutations, R+ and R* scales, O(n) rotations, GL(n) all invertible matrices, SO(2) rotations of a pair.
    """
    from qcompile.analysis import spaces as find
    from qcompile.passes.spaces import prove as run_proof

    found = find(model)
    proof = run_proof(found, seed, each=each) if prove or each else None
    if as_json:
        content = found.to_json()
        if proof is not None:
            content["proof"] = {
                "error": proof.error,
                "holds": proof.holds,
                "spaces": proof.spaces,
                "translations": proof.translations,
                "per_space": {str(k): v for k, v in proof.per_space.items()},
            }
        click.echo(json.dumps(content))
    else:
        click.echo(str(found))
        if proof is not None:
            verdict = "holds" if proof.holds else "FAILS"
            click.echo(
                f"proof {verdict}: relative error {proof.error:.1e} after a random element of {proof.spaces} spaces"
                f" and {proof.translations} translations"
            )
            for index, error in sorted(proof.per_space.items(), key=lambda item: -item[1])[:5]:
                click.echo(f"  #{index:<4} {error:.1e}")
    if proof is not None and not proof.holds:
        context.exit(1)
