"""Run one kernel with given rows and take its time: on this machine, or on a board through TVM's RPC tracker. Without a
board, kernels for ARM are emulated and their instructions counted.

One row reads every weight once, so that its time is that of memory: such calls go through copies of the weights that together
exceed the caches. More rows are timed with one copy.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from qcompile.codegen.kernels.base import Epilogue, LinearKernel, LinearProblem
from qcompile.errors import TargetError
from qcompile.formats import Quantized
from qcompile.targets import arm
from qcompile.targets.target import Target

DISTURBED = 1.15
"""How much longer a computation takes where something else slows the machine down."""

COLD = 48 << 20
"""Bytes of weights that do not fit in the caches."""

COPIES = 64
"""Copies of the weights at most: small ones stay in the caches in a model too."""

SAMPLE = 64
"""Columns that are really quantized; the rest repeats them."""


def random_weight(problem: LinearProblem) -> Quantized:
    """A quantized matrix of the problem's format, made quickly: few columns are quantized and repeated."""
    columns = min(problem.n, SAMPLE)
    sample = np.random.default_rng(0).normal(size=(problem.k, columns)).astype(np.float32)
    made = problem.weight.encode(sample)

    def repeat(array: np.ndarray) -> np.ndarray:
        if array.ndim == 0 or array.shape[-1] != columns:
            return array
        copies = -(-problem.n // columns)
        return np.ascontiguousarray(np.concatenate([array] * copies, axis=-1)[..., : problem.n])

    aux = {name: array if array.ndim < 2 else repeat(array) for name, array in made.aux.items()}
    zero = None if made.zero_point is None else repeat(made.zero_point)
    return Quantized(repeat(made.codes), repeat(made.scale), zero, aux)


def inputs(problem: LinearProblem, rows: int) -> list[np.ndarray]:
    """Activations as the PrimFunc takes them."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, problem.k))
    if not problem.activation.bits:
        return [x.astype(np.float32)]
    codes = np.clip(np.rint(x * 127 / np.abs(x).max(1, keepdims=True)), -127, 127)
    return [(codes + 128).astype(np.uint8), np.full(rows, 0.01, np.float32)]


class Runner(ABC):
    """Where kernels run.

    Attributes:
        machine: its name.
        counts: whether it counts instructions, in millions, instead of seconds.
    """

    machine: str = ""
    counts = False

    @abstractmethod
    def time(
        self, problem: LinearProblem, family: LinearKernel, config: dict[str, Any], target: Target, rows: Sequence[int]
    ) -> list[float]:
        """Seconds of one call for every number of rows (millions of instructions, if `counts`); without epilogue."""


def plain(problem: LinearProblem) -> LinearProblem:
    """The same problem without its epilogue, which all kernels share."""
    return replace(problem, epilogue=Epilogue(), m=None)


def build(problem: LinearProblem, family: LinearKernel, config: dict[str, Any], target: Target) -> Any:
    """The executable of one kernel, whose function is ``kernel``."""
    function = family.build(problem, config, target, "kernel")
    return tvm.compile(tvm.IRModule({"kernel": function}), target=target.tvm())


@dataclass
class LocalRunner(Runner):
    """This machine. One thread is timed by its own CPU clock, which other processes disturb least.

    They do slow the other thread of a core down, though, and take bandwidth. So a fixed computation before and after tells
    whether the machine was at rest, and if it was not, the calls are repeated.

    Attributes:
        seconds: spent on one number of rows.
        patience: how often that is repeated at most on a machine with other work.
    """

    seconds: float = 0.15
    patience: int = 5

    def __post_init__(self) -> None:
        self.machine = processor_name()
        self._least = min(_fixed_computation() for _ in range(20))

    def time(
        self, problem: LinearProblem, family: LinearKernel, config: dict[str, Any], target: Target, rows: Sequence[int]
    ) -> list[float]:
        problem = plain(problem)
        kernel = build(problem, family, config, target)["kernel"]
        packed = family.pack(problem, config, random_weight(problem))
        size = sum(array.nbytes for array in packed.values())
        copies = [
            [tvm.runtime.tensor(array) for array in packed.values()] for _ in range(min(COLD // size + 1, COPIES))
        ]
        tvm.get_global_func("runtime.config_threadpool")(1, problem.threads)
        clock = time.thread_time if problem.threads == 1 else time.perf_counter
        found = []
        for m in rows:
            x = [tvm.runtime.tensor(array) for array in inputs(problem, m)]
            out = tvm.runtime.empty((m, problem.n), "float32")
            turns = copies if m == 1 else copies[:1]
            found.append(self._shortest(lambda i: kernel(*x, *turns[i % len(turns)], out), clock, len(turns)))  # noqa: B023
        return found

    def _shortest(self, call: Callable[[int], None], clock: Callable[[], float], turns: int) -> float:
        """The lower quartile of single calls, of that block of them in which others disturbed least."""
        call(0)
        blocks: list[float] = []
        for _ in range(self.patience):
            before = self._disturbance()
            samples: list[float] = []
            end = time.perf_counter() + self.seconds
            while len(samples) < 5 + turns or time.perf_counter() < end:
                start = clock()
                call(len(samples))
                samples.append(clock() - start)
            blocks.append(float(np.percentile(samples, 25)))
            if max(before, self._disturbance()) < DISTURBED:
                break
            time.sleep(0.1)
        return min(blocks)

    def _disturbance(self) -> float:
        """How many times longer than ever before in this process a fixed computation takes now."""
        taken = min(_fixed_computation() for _ in range(3))
        self._least = min(self._least, taken)
        return taken / self._least


def _fixed_computation() -> float:
    """Seconds on this thread's CPU clock for the same integers each time."""
    start, x = time.thread_time(), 0
    for i in range(20_000):
        x = (31 * x + i) & 0xFFFF
    return time.thread_time() - start


@dataclass
class RpcRunner(Runner):
    """A board that has registered with a TVM RPC tracker under ``key``.

    Attributes:
        host, port: of the tracker.
        key: of the board.
        link: makes a shared library of the target from object files; the host's own linker if None.
        repeat: measurements of each number of rows.
    """

    host: str
    port: int
    key: str
    link: Callable[..., Any] | None = None
    repeat: int = 7

    def __post_init__(self) -> None:
        self.machine = self.key
        self._session: Any = None

    def session(self) -> Any:
        """The connection to the board, made at first use.

        Raises:
            TargetError: no tracker there, or no board with that key.
        """
        if self._session is None:
            from tvm import rpc

            try:
                socket.create_connection((self.host, self.port), timeout=5).close()  # TVM would try for a minute
                tracker = rpc.connect_tracker(self.host, self.port)
                servers = {info["key"].removeprefix("server:") for info in tracker.summary()["server_info"]}
                if self.key not in servers:  # TVM would wait until one registers
                    raise OSError(f"it knows {', '.join(sorted(servers)) or 'no board'}")
                self._session = tracker.request(self.key, priority=1, session_timeout=600, max_retry=1)
            except (RuntimeError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise TargetError(f"no board {self.key!r} at tracker {self.host}:{self.port}: {reason}") from error
        return self._session

    def time(
        self, problem: LinearProblem, family: LinearKernel, config: dict[str, Any], target: Target, rows: Sequence[int]
    ) -> list[float]:
        problem, session = plain(problem), self.session()
        device = session.cpu(0)
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            path = Path(folder) / f"kernel-{os.getpid()}-{time.monotonic_ns()}.so"
            options = {} if self.link is None else {"fcompile": self.link}
            build(problem, family, config, target).export_library(str(path), **options)
            session.upload(str(path))
            module = session.load_module(path.name)
        try:
            session.get_function("runtime.config_threadpool")(1, problem.threads)
            packed = family.pack(problem, config, random_weight(problem))
            weights = [tvm.runtime.tensor(array, device) for array in packed.values()]
            found = []
            for m in rows:
                x = [tvm.runtime.tensor(array, device) for array in inputs(problem, m)]
                out = tvm.runtime.empty((m, problem.n), "float32", device)
                flush = {"f_preproc": "cache_flush_cpu_non_first_arg"} if m == 1 else {}
                timer = module.time_evaluator("kernel", device, number=1, repeat=self.repeat, **flush)
                found.append(float(np.median(timer(*x, *weights, out).results)))
            return found
        finally:
            session.remove(path.name)


class CountingRunner(Runner):
    """Instructions of an ARM kernel under qemu-user: exact, the same in every run, and no time.

    They leave out memory, and how many instructions a processor issues at once.
    """

    machine = "qemu-user"
    counts = True

    def time(
        self, problem: LinearProblem, family: LinearKernel, config: dict[str, Any], target: Target, rows: Sequence[int]
    ) -> list[float]:
        from qcompile.codegen.kernels.arm.harness import Executable

        problem, target = replace(plain(problem), threads=1), replace(arm.linux(target), cores=1)
        program = Executable({"tuned": family.build(problem, config, target, "tuned")}, target)
        packed = list(family.pack(problem, config, random_weight(problem)).values())
        found = []
        for m in rows:
            out = np.empty((m, problem.n), np.float32)
            found.append(program.counts({"tuned": [*inputs(problem, m), *packed, out]})["tuned"] / 1e6)
        return found


def processor_name() -> str:
    """What the operating system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
