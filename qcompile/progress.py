"""Progress of long work: bars on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[..., None]
"""Advances a stage by one step; may be given a note to show beside its title."""


class Progress:
    """Shows one line per stage. ``Progress(False)`` shows nothing."""

    def __init__(self, enabled: bool | None = None) -> None:
        self._display: Any = None
        self._enabled = sys.stderr.isatty() if enabled is None else enabled

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._display = Bars(
                SpinnerColumn(finished_text="[green]\u2713"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = 1) -> Iterator[Advance]:
        """A stage of ``total`` steps; yields the function that advances it by one."""
        if self._display is None:
            yield lambda note="": None
            return
        task = self._display.add_task(title, total=total)
        done = 0

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            self._display.update(task, advance=1, description=f"{title}  [dim]{note}" if note else title)

        yield advance
        self._display.update(task, total=total or max(done, 1), completed=total or max(done, 1))
