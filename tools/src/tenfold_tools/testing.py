"""Pytest plugin of the workshop: process groups, the gpu marker, Triton without a GPU.

- fixture `run_distributed`: runs a module-level function on N gloo processes of this machine;
- marker `gpu`: skips, with the reason, where no CUDA device can be used;
- fixture `triton_interpreter`: runs a module-level function where Triton kernels are interpreted on the CPU.

Loading the plugin imports neither torch, jax nor triton: they are looked at when a test asks for them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tenfold_tools._workers import Worker, WorkerError, gather, target_of

__all__ = ["WorkerError", "run_distributed", "triton_interpreter"]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, so that `--strict-markers` accepts it wherever the plugin is installed."""
    config.addinivalue_line(
        "markers",
        "gpu(framework='torch'): needs a CUDA device seen by torch or jax; skipped with the reason",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `gpu` where there is none, when its turn comes: a deselected one costs nothing."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    framework = _framework(*marker.args, **marker.kwargs)
    reason = why_no_gpu(framework)
    if reason is not None:
        pytest.skip(reason)


@functools.cache
def why_no_gpu(framework: str) -> str | None:
    """Why a CUDA device cannot be used from a framework; None when it can.

    Args:
        framework: "torch" or "jax".
    """
    if importlib.util.find_spec(framework) is None:
        return f"needs a GPU through {framework}, which is not installed"
    with warnings.catch_warnings(record=True) as caught:
        # An old driver or a busy device is announced as a warning; it belongs into the reason.
        warnings.simplefilter("always")
        try:
            present = _torch_sees_gpu() if framework == "torch" else _jax_sees_gpu()
            detail = ""
        except RuntimeError as error:
            present, detail = False, f": {error}"
    if present:
        return None
    notes = "".join(f"; {warning.message}" for warning in caught)
    return f"needs a GPU, {framework} {_version(framework)} sees none{detail}{notes}"


@pytest.fixture
def run_distributed() -> Callable[..., list[Any]]:
    """Runs `function(rank, world_size, *args)` on N gloo processes and returns the ranks' values in order.

    Call it as `run_distributed(function, nprocs=2, *args, timeout=60)`. The processes find each other through
    a file, so no port has to be free. Each computes on one thread. The function must be defined at the top
    level of the test module; arguments and values are pickled, so every rank owns its copy.

    A failing rank fails the test with that rank's traceback; the other ranks are stopped at once, even inside
    a collective. After `timeout` seconds all are stopped, and the message shows where each of them was.

    Raises:
        WorkerError: if a rank failed, died, or the time ran out.
        TypeError: if the function or an argument cannot be sent to another process.
        ValueError: if nprocs or timeout is not positive.
    """
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch for a gloo process group, which is not installed")
    return _run_distributed


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[Callable[..., Any]]:
    """Runs `function(*args)` in a process whose Triton kernels are interpreted on the CPU; returns its value.

    Call it as `triton_interpreter(function, *args, timeout=60)`. Triton reads TRITON_INTERPRET when it is
    imported and when a kernel is decorated, and what torch.compile does depends on it: set for the whole run,
    it would test another product than the user's, and on a GPU machine keep the real kernels from being
    tested. So a second process has it, and serves all tests of the session, which pay for its imports once.

    Raises:
        WorkerError: if the function failed, or the time ran out.
        TypeError: if the function or an argument cannot be sent to another process.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which is not installed (it is optional; Linux only)")
    workers: list[Worker] = []

    def call(function: Callable[..., Any], *args: Any, timeout: float = 60) -> Any:
        __tracebackhide__ = True
        target = target_of(function)
        if not workers:
            interpreted = {"TRITON_INTERPRET": "1"}
            workers.append(Worker("the Triton interpreter's process", interpreted, preloaded=False))
        try:
            workers[0].submit(target, *args)
            return gather(workers, timeout)[0]
        finally:
            # Dead or hung: the next test gets a fresh one.
            if not workers[0].idle:
                workers.pop().kill()

    yield call
    for worker in workers:
        worker.kill()


def _run_distributed(
    function: Callable[..., Any], nprocs: int = 2, *args: Any, timeout: float = 60
) -> list[Any]:
    __tracebackhide__ = True
    if nprocs < 1:
        raise ValueError(f"nprocs must be >= 1, got {nprocs!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0 seconds, got {timeout!r}")
    target, wrapper = target_of(function), target_of(_in_process_group)
    # The loopback interface is enough and always there; gloo's default needs a host name that resolves.
    env = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="tenfold-") as scratch:
        meeting_point = str(Path(scratch) / "rendezvous")
        try:
            for rank in range(nprocs):
                workers.append(Worker(f"rank {rank} of {nprocs}", env, preloaded=True))
                workers[rank].submit(target, rank, nprocs, meeting_point, timeout, *args, wrapper=wrapper)
            # A rank that is done stays until all are: leaving would break its peers' last collective.
            return gather(workers, timeout)
        finally:
            for worker in workers:
                worker.kill()


def _in_process_group(
    function: Callable[..., Any], rank: int, world_size: int, meeting_point: str, timeout: float, *args: Any
) -> Any:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
        # Longer than the test's own limit, whose message says more.
        timeout=timedelta(seconds=timeout + 60),
    )
    return function(rank, world_size, *args)


def _framework(framework: str = "torch") -> str:
    if framework not in ("torch", "jax"):
        raise ValueError(f"the gpu marker takes 'torch' or 'jax', got {framework!r}")
    return framework


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _jax_sees_gpu() -> bool:
    import jax  # pyright: ignore[reportMissingImports]

    return len(jax.devices("gpu")) > 0


def _version(framework: str) -> str:
    return str(getattr(sys.modules.get(framework), "__version__", ""))
