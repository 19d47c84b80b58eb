"""Runs the ONNX backend node tests through the Relax back end: convert, compile for this CPU, execute, compare.

    python benchmarks/onnx_backend.py                         # all cases; writes docs/onnx-operators.md
    python benchmarks/onnx_backend.py --filter '^test_resize' # some cases; prints only
    python benchmarks/onnx_backend.py --resume state.json --seconds 180   # a part; repeat until all have run

Every case ends in one of five ways. *passed*: outputs have the expected dtypes, shapes and values. *unsupported*: the
converter refused with an error that names the operator and the reason. *wrong*, *crashed* and *timed out* are defects.

Cases run in forked worker processes, so that one that takes its process down costs itself only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

STATUSES = ("passed", "unsupported", "wrong", "crashed", "timed out")

#: The expected 16-bit outputs were rounded to 16 bits after every step, ours are computed in 32 bits and rounded once:
#: two units in the last place are allowed.
_HALF_ULPS = {"float16": 2.0**-9, "bfloat16": 2.0**-6}


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        status: one of :data:`STATUSES`.
        detail: the reason, empty when passed.
        operators: operator types in the case's graph.
        seconds: time taken.
    """

    status: str
    detail: str
    operators: tuple[str, ...]
    seconds: float = 0.0


def load_cases() -> list[Any]:
    """All node test cases of the installed onnx package, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = [case for case in load_model_tests(kind="node") if case.model is not None]
    return sorted(cases, key=lambda case: case.name)


def operators(case: Any) -> tuple[str, ...]:
    """Operator types of a case, the first node's first."""
    found: dict[str, None] = {}
    for node in case.model.graph.node:
        found[f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] = None
    return tuple(found)


def run_case(case: Any) -> Outcome:
    """Converts, compiles and runs one case in this process."""
    from qcompile.errors import UnsupportedOperatorError

    start = time.perf_counter()
    try:
        _execute(case)
        status, detail = "passed", ""
    except UnsupportedOperatorError as error:
        status, detail = "unsupported", str(error)
    except AssertionError as error:
        status, detail = "wrong", _first_line(str(error))
    except Exception as error:
        status, detail = "crashed", _first_line(f"{type(error).__name__}: {error}")
    return Outcome(status, detail, operators(case), round(time.perf_counter() - start, 3))


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _execute(case: Any) -> None:
    import onnx_ir as ir
    import tvm
    from tvm import relax

    from qcompile.codegen.relax import compile_relax, to_relax

    program = to_relax(ir.from_proto(case.model))
    executable = compile_relax(program, opt_level=0)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for inputs, expected in case.data_sets:
        arguments = [tvm.runtime.tensor(_stored(x, spec)) for x, spec in zip(inputs, program.inputs)]
        arguments += [tvm.runtime.tensor(x) for x in program.params.values()]
        result = machine["main"](*arguments)
        results = [result] if len(program.outputs) == 1 else list(result)
        assert len(results) == len(expected), f"{len(results)} outputs instead of {len(expected)}"
        for i, (actual, wanted, spec) in enumerate(zip(results, expected, program.outputs)):
            _compare(i, _loaded(actual.numpy(), spec), _array(wanted), case)


def _stored(array: Any, spec: Any) -> np.ndarray:
    import onnx_ir as ir

    from qcompile.codegen.relax import dtypes

    array = _array(array)
    return np.ascontiguousarray(dtypes.to_storage(array, ir.DataType[spec.onnx_dtype])).reshape(array.shape)


def _array(value: Any) -> np.ndarray:
    """A test's datum: an array, a number, or a TensorProto."""
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _loaded(array: np.ndarray, spec: Any) -> np.ndarray:
    import onnx_ir as ir

    from qcompile.codegen.relax import dtypes

    return dtypes.from_storage(array, ir.DataType[spec.onnx_dtype])


def _compare(index: int, actual: np.ndarray, wanted: np.ndarray, case: Any) -> None:
    assert actual.dtype == wanted.dtype, f"output {index}: dtype {actual.dtype} instead of {wanted.dtype}"
    assert actual.shape == wanted.shape, f"output {index}: shape {actual.shape} instead of {wanted.shape}"
    rtol = max(case.rtol, _HALF_ULPS.get(str(wanted.dtype), 0.0))
    if wanted.dtype.kind in "bui":
        actual, wanted = actual.astype(object), wanted.astype(object)
        assert (actual == wanted).all(), f"output {index}: {_difference(actual, wanted)}"
        return
    a, b = actual.astype(np.float64), wanted.astype(np.float64)
    largest = np.max(np.abs(b[np.isfinite(b)]), initial=0.0)
    atol = max(case.atol, 1e-7, 4 * np.finfo(np.float32).eps * largest)  # expected zeros hold rounding of larger terms
    close = np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    assert close.all(), f"output {index}: {_difference(a[~close], b[~close])} ({(~close).sum()} of {close.size} differ)"


def _difference(actual: np.ndarray, wanted: np.ndarray) -> str:
    return f"{actual.reshape(-1)[:6].tolist()} instead of {wanted.reshape(-1)[:6].tolist()}"


def _worker(cases: Sequence[Any], pipe: Any) -> None:
    """Runs cases one after another, announcing each before it starts."""
    warnings.simplefilter("ignore")
    with np.errstate(all="ignore"):
        for case in cases:
            pipe.send(("start", case.name, None))
            pipe.send(("done", case.name, run_case(case)))
    pipe.send(("end", "", None))


def run_cases(
    cases: Iterable[Any],
    *,
    limit_s: float = 60.0,
    batch: int = 60,
    seconds: float = math.inf,
    report: Callable[[str, Outcome], None] | None = None,
) -> dict[str, Outcome]:
    """Runs cases in forked workers of ``batch`` cases each; a worker that dies or stalls loses the case it was at.

    Args:
        cases: what :func:`load_cases` returns, or a part of it.
        limit_s: time limit of one case.
        batch: cases per worker.
        seconds: no worker starts after this time; what has not run by then has no outcome.
        report: called after each case.
    """
    import onnx_ir  # noqa: F401  (imported once, before forking)
    import tvm  # noqa: F401

    from qcompile.codegen import relax  # noqa: F401

    context = multiprocessing.get_context("fork")
    waiting = list(cases)
    outcomes: dict[str, Outcome] = {}

    def record(case: Any, outcome: Outcome) -> None:
        outcomes[case.name] = outcome
        if report:
            report(case.name, outcome)

    start = time.monotonic()
    while waiting and time.monotonic() - start < seconds:
        chunk, waiting = waiting[:batch], waiting[batch:]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(chunk, sender), daemon=True)
        process.start()
        sender.close()
        while chunk:
            lost = None
            try:
                if not receiver.poll(limit_s):
                    lost = Outcome("timed out", f"no result after {limit_s:g} s", operators(chunk[0]), limit_s)
                else:
                    kind, _, outcome = receiver.recv()
                    if kind == "done":
                        record(chunk.pop(0), outcome)
                    elif kind == "end":
                        break
            except EOFError:
                process.join()
                lost = Outcome("crashed", f"the process ended with {process.exitcode}", operators(chunk[0]))
            if lost:
                record(chunk.pop(0), lost)
                waiting = chunk + waiting
                break
        process.kill()
        process.join()
        receiver.close()
    return outcomes


def summary(outcomes: dict[str, Outcome]) -> str:
    """One line with the number of cases that ended each way."""
    count = Counter(outcome.status for outcome in outcomes.values())
    return ", ".join(f"{count[status]} {status}" for status in STATUSES)


def markdown(outcomes: dict[str, Outcome]) -> str:
    """The report: totals, cases per operator, and the reason of every refusal."""
    import onnx

    by_operator: dict[str, list[tuple[str, Outcome]]] = defaultdict(list)
    for name, outcome in outcomes.items():
        by_operator[_tested_operator(name, outcome)].append((name, outcome))
    count = Counter(outcome.status for outcome in outcomes.values())
    lines = [
        "# ONNX operators",
        "",
        f"The {len(outcomes):,} node tests of onnx {onnx.__version__}, converted to Relax, compiled for x86 and executed;",
        "outputs are compared in dtype, shape and value (the case's own tolerance, 1e-3 relative by default).",
        "`python benchmarks/onnx_backend.py` writes this page.",
        "",
        "| " + " | ".join(STATUSES) + " |",
        "|" + "---|" * len(STATUSES),
        "| " + " | ".join(f"{count[status]:,}" for status in STATUSES) + " |",
        "",
        "Cases whose name ends in `expanded` test the function body of an operator; they are counted with that operator.",
        "",
        "| operator | passed | not | reason |",
        "|---|---|---|---|",
    ]
    for operator in sorted(by_operator, key=str.lower):
        cases = by_operator[operator]
        passed = sum(outcome.status == "passed" for _, outcome in cases)
        reasons = Counter(_reason(outcome) for _, outcome in cases if outcome.status != "passed")
        text = "; ".join(f"{reason} ({n})" for reason, n in sorted(reasons.items()))
        lines.append(f"| {operator} | {passed} | {len(cases) - passed or ''} | {text} |")
    return "\n".join(lines) + "\n"


def _tested_operator(name: str, outcome: Outcome) -> str:
    """The operator a case is about: the one its name begins with, else the graph's first."""
    if "_expanded" not in name:
        plain = name.removeprefix("test_").replace("_", "")
        matching = [o for o in outcome.operators if plain.startswith(o.rpartition("::")[2].lower())]
        return max(matching, key=len) if matching else outcome.operators[0]
    import onnx

    plain = name.removeprefix("test_").replace("_", "")
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    aliases = {
        "sce": "SoftmaxCrossEntropyLoss",
        "nllloss": "NegativeLogLikelihoodLoss",
        "mvn": "MeanVarianceNormalization",
    }
    for prefix, operator in aliases.items():
        if plain.startswith(prefix):
            return operator
    matching = [o for o in known if plain.startswith(o.lower())]
    return max(matching, key=len) if matching else outcome.operators[0]


def _reason(outcome: Outcome) -> str:
    detail = outcome.detail
    if outcome.status == "unsupported":
        operator, _, reason = detail.partition(": ")
        match = re.match(r"(\S+) \((?:node|unnamed)", operator)
        return (f"{match.group(1)}: {reason}" if match else detail).replace("|", "\\|")
    return f"**{outcome.status}** {detail}".replace("|", "\\|")


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes written by an earlier run; none if there is no such file."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: Outcome(**{**o, "operators": tuple(o["operators"])}) for name, o in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code says whether a case was wrong, crashed or timed out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="run the cases whose name this regular expression finds")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per case")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--resume", type=Path, help="keep the outcomes in this file, and add those of cases not in it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--verbose", action="store_true", help="print every case that did not pass")
    parser.add_argument("--out", type=Path, help="the report (default: docs/onnx-operators.md when all cases run)")
    options = parser.parse_args(arguments)
    cases = [case for case in load_cases() if re.search(options.filter, case.name)]

    def report(name: str, outcome: Outcome) -> None:
        if options.verbose and outcome.status != "passed":
            print(f"{outcome.status:12} {name}: {outcome.detail}", flush=True)

    start = time.perf_counter()
    names = {case.name for case in cases}
    known = {k: o for k, o in (read(options.resume) if options.resume else {}).items() if k in names}
    todo = [case for case in cases if case.name not in known]
    outcomes = known | run_cases(todo, limit_s=options.limit, batch=20, seconds=options.seconds, report=report)
    print(f"{len(outcomes)} cases in {time.perf_counter() - start:.0f} s: {summary(outcomes)}")
    for path in filter(None, (options.json, options.resume)):
        path.write_text(json.dumps({k: asdict(v) for k, v in outcomes.items()}, indent=1))
    if left := len(cases) - len(outcomes):
        print(f"{left} cases left: run the same command again")
        return 1
    out = options.out or (Path(__file__).parents[1] / "docs" / "onnx-operators.md" if not options.filter else None)
    if out:
        out.write_text(markdown(dict(sorted(outcomes.items()))))
    return int(any(outcome.status not in ("passed", "unsupported") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
