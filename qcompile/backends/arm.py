"""64-bit ARM: the same artifact as on x86, linked for another machine, and on request a plain C library.

On the board the program runs with ``pip install apache-tvm``; see docs/arm.md for the C library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qcompile.backends.cpu import Cpu
from qcompile.errors import TargetError
from qcompile.targets import arm

if TYPE_CHECKING:
    from qcompile.targets.target import Target


class Arm(Cpu):
    """Compiles programs for ARM anywhere, and loads them on ARM machines."""

    def linker(self, target: Target) -> Callable[[str, list[str]], None] | None:
        """A compiler for the target.

        Raises:
            TargetError: there is none.
        """
        compiler = arm.compiler(target)
        return lambda output, objects: compiler.shared(output, objects, apple="apple" in target.triple)

    def check_tools(self, target: Target) -> None:
        """Fail if there is no compiler for the target."""
        self.linker(target)

    def check(self, target: Mapping[str, Any]) -> None:
        """Fail if this machine is no ARM machine, or lacks an instruction the program uses.

        Raises:
            TargetError: naming what is missing, and what to do.
        """
        if missing := sorted(arm.missing_features(set(target["features"]))):
            here = "is no 64-bit ARM machine" if not arm.host_features() else f"lacks {', '.join(missing)}"
            raise TargetError(
                f"the program was compiled for arm/{target['cpu']}; this machine {here}. "
                "Copy the artifact to the board, or run it here with `qcompile run --emulate`"
            )
