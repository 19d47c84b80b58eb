"""The command line. One file per command; this one holds the group, the options they share and error handling."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from qcompile import __version__
from qcompile.errors import QcompileError


class Commands(click.Group):
    """Prints errors a user can cause as one line and exits with the error's own code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except QcompileError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; nothing was written", err=True)
            context.exit(130)
        except BrokenPipeError:
            context.exit(141)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        # Commands are imported when they are used: `qcompile run` must not pay for the compiler's imports.
        import importlib

        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"qcompile.cli.{COMMANDS[name]}"), name)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)


COMMANDS = {
    "compile": "compile",
    "run": "run",
    "generate": "generate",
    "bench": "bench",
    "tune": "tune",
    "inspect": "inspect",
    "simulate": "simulate",
    "synth": "synth",
    "spaces": "spaces",
    "recipes": "lists",
    "transforms": "lists",
    "formats": "lists",
    "targets": "lists",
    "demo": "demo",
}


class Places(click.types.StringParamType):
    """Files and modules; in the environment between `os.pathsep`, as in PATH, or where there is none between blanks."""

    def split_envvar_value(self, value: str) -> list[str]:
        parts = value.split(os.pathsep if os.pathsep in value else None)
        return [part.strip() for part in parts if part.strip()]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcompile")
@click.option("--debug", is_flag=True, help="Show the full traceback of errors.")
@click.option(
    "--extension",
    "extensions",
    type=Places(),
    multiple=True,
    metavar="FILE|MODULE",
    envvar="QCOMPILE_EXTENSIONS",
    help="Load formats, kernels, transforms and recipes of your own first (runs the file's code); may be repeated.",
)
def cli(debug: bool, extensions: tuple[str, ...]) -> None:
    """Compile float neural networks to low-bit programs."""
    if extensions:
        from qcompile.extensions import load

        for place in extensions:
            load(place)


def main() -> None:
    """Entry point."""
    try:
        cli(standalone_mode=True)
    except QcompileError:
        if "--debug" in sys.argv:
            raise
        raise SystemExit(1) from None
