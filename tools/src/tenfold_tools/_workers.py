"""Processes that run module-level functions for a test and report what really happened.

A `Worker` is one fresh interpreter. It is sent the file, module and name of a function with pickled
arguments, and answers with the value or with the traceback as text. `gather` waits for several workers under
one time limit and says which of them failed, with its own words, or where it was when the time ran out.

On Linux the interpreters are forked from a server process that has imported torch and done nothing else: it
pays the seconds of that import once per test run, and they start as clean as spawned ones.

The function travels by file as well as by name, so that it is found whichever way pytest imported its module.
Values travel as plain pickles: torch's own would hand over shared memory, in which ranks see each other's
writes and which vanishes with the process. Both ends are ours, nothing untrusted is unpickled.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["Target", "Worker", "WorkerError", "gather", "target_of"]

# Ranks that fail for a reason of their own do so together; later errors are only echoes of the first.
GRACE_SECONDS = 0.5


class WorkerError(RuntimeError):
    """A function failed, died or ran out of time in another process, whose words the message holds."""


@dataclass(frozen=True)
class Target:
    """Where another process finds a function."""

    module: str
    path: str
    name: str


def target_of(function: Callable[..., Any]) -> Target:
    """Address of a function, for use in another process.

    Raises:
        TypeError: if the function is not reachable as a global name of a module that has a file.
    """
    module = sys.modules.get(getattr(function, "__module__", ""))
    name = getattr(function, "__qualname__", "")
    path = getattr(module, "__file__", None)
    if path is None or getattr(module, name, None) is not function:
        raise TypeError(
            "function must be defined at the top level of a module, where another process can import it "
            f"(no lambda, partial or nested function), got {function!r}"
        )
    return Target(module=function.__module__, path=str(Path(path).resolve()), name=name)


class Worker:
    """One process that runs functions one after the other.

    Args:
        label: how messages call the process, such as "rank 0".
        env: environment variables to add to this process's own.
        preloaded: whether the process may start with torch imported already, where the platform can do that.
            False when a variable in env must be there before an import.
    """

    def __init__(self, label: str, env: Mapping[str, str], *, preloaded: bool) -> None:
        self.label = label
        self.idle = True
        self._scratch = tempfile.TemporaryDirectory(prefix="tenfold-")
        self._stack = Path(self._scratch.name) / "stack"
        self.connection, theirs = multiprocessing.Pipe()
        self._process = _context(preloaded).Process(
            target=_serve, args=(theirs, str(self._stack), {**os.environ, **env}), daemon=True
        )
        self._process.start()
        theirs.close()

    def submit(self, target: Target, *args: Any, wrapper: Target | None = None) -> None:
        """Starts `function(*args)` in the process; `gather` collects its outcome.

        Args:
            target: the function.
            args: its arguments; they are unpickled after the function's module is imported there.
            wrapper: if given, `wrapper(function, *args)` is called instead.

        Raises:
            TypeError: if an argument cannot be pickled.
        """
        try:
            pickled = pickle.dumps(args)
        except Exception as error:
            raise TypeError(f"the arguments must be picklable to reach another process: {error}") from error
        self.connection.send((target, wrapper, pickled, sys.path))
        self.idle = False

    def answer(self) -> tuple[Any, str | None]:
        """Waits for the outcome: the value and None, or None and what went wrong."""
        try:
            pickled, failure = self.connection.recv()
        except EOFError:
            self._process.join(1)
            return None, f"the process died without a Python error, exit code {self._process.exitcode}"
        self.idle = True
        return (None, failure) if failure else (pickle.loads(pickled), None)  # noqa: S301 - from our own child

    def where(self) -> str:
        """Python stack of the running process, or why there is none."""
        if not hasattr(signal, "SIGUSR1") or self._process.pid is None:
            return "its stack is not available on this platform"
        os.kill(self._process.pid, signal.SIGUSR1)
        patience = time.monotonic() + 1.0
        while time.monotonic() < patience:
            text = self._stack.read_text() if self._stack.exists() else ""
            if text.endswith("\n"):
                return text.rstrip()
            time.sleep(0.02)
        return "it gave no stack"

    def kill(self) -> None:
        """Ends the process now, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        self._scratch.cleanup()


def gather(workers: Sequence[Worker], timeout: float) -> list[Any]:
    """Values of what was submitted to each worker, in order.

    Args:
        workers: processes to which one function each was submitted.
        timeout: seconds for all of them together.

    Raises:
        WorkerError: if a function raised, a process died, or the time ran out. Nobody is killed here.
    """
    values: dict[str, Any] = {}
    failures: dict[str, str] = {}
    pending = {worker.connection: worker for worker in workers}
    deadline = time.monotonic() + timeout
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            worker = pending.pop(connection)  # pyright: ignore[reportArgumentType]
            value, failure = worker.answer()
            if failure is None:
                values[worker.label] = value
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures[worker.label] = failure
    if failures:
        stopped = [f"{worker.label} was still running and was stopped" for worker in pending.values()]
        raise WorkerError(
            "\n".join([*(f"{label} failed:\n{text}" for label, text in failures.items()), *stopped])
        )
    if pending:
        lines = [f"not finished after {timeout:g} s"]
        lines += [f"{label} returned" for label in values]
        lines += [f"{worker.label} was here:\n{worker.where()}" for worker in pending.values()]
        raise WorkerError("\n".join(lines))
    return [values[worker.label] for worker in workers]


def load(target: Target) -> Callable[..., Any]:
    """The function at an address: by its module's name if that leads to the same file, else from the file."""
    try:
        module = importlib.import_module(target.module)
    except ModuleNotFoundError:
        module = None
    if module is None or not _comes_from(module, target.path):
        spec = importlib.util.spec_from_file_location(target.module, target.path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {target.path}")
        module = importlib.util.module_from_spec(spec)
        _register(module, target.module)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[target.module]
            raise
    return getattr(module, target.name)


def _context(preloaded: bool) -> SpawnContext | ForkServerContext:
    if not preloaded or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The first optimiser step or DDP of a process imports torch._dynamo, which takes as long as torch itself.
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", __name__])
    return context


def _register(module: ModuleType, name: str) -> None:
    # With --import-mode=importlib a name may have parents that no import finds; unpickling looks for them.
    parent = name.rpartition(".")[0]
    while parent:
        sys.modules.setdefault(parent, ModuleType(parent))
        parent = parent.rpartition(".")[0]
    sys.modules[name] = module


def _comes_from(module: ModuleType, path: str) -> bool:
    return module.__file__ is not None and Path(module.__file__).resolve() == Path(path)


def _serve(connection: Connection, stack: str, env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    with Path(stack).open("w") as stack_file:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=stack_file)
        while True:
            try:
                target, wrapper, pickled, path = connection.recv()
            except EOFError:
                return
            sys.path[:] = path
            try:
                function = load(target)
                args = pickle.loads(pickled)  # noqa: S301 - sent by our own parent
                value = load(wrapper)(function, *args) if wrapper else function(*args)
                connection.send((pickle.dumps(value), None))
            except BaseException as error:
                connection.send((None, _describe(error)))


def _describe(error: BaseException) -> str:
    # The reader wants the test's own frames, not this file's above them.
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__)).rstrip()
