"""Schedules for the kernels that Relax's legalization makes: threads, vectors, register tiles, vector math.

Hand-written kernels carry the attribute `SCHEDULED` and are left alone. A function that cannot be read as a sequence of
plain loop nests keeps its loops; why is logged (``qcompile.schedule_cpu``, level INFO) and returned by
`schedule_functions`. Results change by float rounding only: sums are taken in another order, and exp, erf, tanh and
sigmoid come from polynomials.
"""

from __future__ import annotations

import logging

import tvm
from tvm import relax, tirx

from qcompile.codegen.kernels.cpu.vector import SCHEDULED
from qcompile.codegen.relax.loop_writer import write
from qcompile.codegen.relax.nests import NotANest, parse, simplify
from qcompile.codegen.relax.vector_math import allows_vector_math, use_vector_math
from qcompile.targets.target import Target

_log = logging.getLogger("qcompile.schedule_cpu")


def schedule_cpu(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """The module with every unscheduled PrimFunc scheduled for ``target``, as far as that is possible."""
    return schedule_functions(mod, target)[0]


def schedule_functions(mod: tvm.IRModule, target: Target) -> tuple[tvm.IRModule, dict[str, str]]:
    """Like `schedule_cpu`; also returns why functions were left as they are, by name."""
    scheduled, skipped = {}, {}
    for name, function in mod.functions_items():
        if not isinstance(function, tirx.PrimFunc) or _is_done(function):
            continue
        if relax.analysis.has_reshape_pattern(function):
            continue  # becomes a view
        try:
            scheduled[name] = schedule_function(function, target)
        except NotANest as reason:
            skipped[name.name_hint] = str(reason)
        except Exception as error:
            # Slow code is better than none; the log keeps what happened.
            skipped[name.name_hint] = f"{type(error).__name__}: {error}"
            _log.debug("scheduling %s failed", name.name_hint, exc_info=True)
        if name.name_hint in skipped:
            _log.info("%s keeps its plain loops: %s", name.name_hint, skipped[name.name_hint])
            if allows_vector_math(function.body):
                scheduled[name] = function.with_body(use_vector_math(function.body))
    result = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for name, function in scheduled.items():
        result.update_func(name, function)
    return result, skipped


def schedule_function(function: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """One function, scheduled.

    Raises:
        NotANest: it is not a sequence of plain loop nests.
    """
    nests = parse(function)
    simplify(nests)
    lanes, registers = (16, 32) if target.has("avx512") else (4, 32) if target.kind == "arm" else (8, 16)
    return write(nests, lanes, registers, target.cores)


def _is_done(function: tirx.PrimFunc) -> bool:
    attrs = function.attrs or {}
    return any(name in attrs for name in (SCHEDULED, "tirx.is_scheduled", "tir.is_scheduled"))
