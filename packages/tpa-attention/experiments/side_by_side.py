"""Independent runs in processes of their own, for devices that one small run leaves idle.

A training step of a small model is a few hundred kernels of microseconds, launched by one Python thread: a
GPU waits most of the time. Runs that do not depend on each other fill it when every core launches one. What
a run computes does not change: same function, same arguments, same seeds.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def worker_count(device: str, jobs: int) -> int:
    """One process per core on a GPU, and none beside this one on a CPU, whose cores one run keeps busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs)) if device.startswith("cuda") else 1


def results(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], workers: int, module: ModuleType
) -> Iterator[Result]:
    """`function(*job)` of every job, in their order, each as soon as it and those before it are done.

    Args:
        function: defined at the top of `module`.
        jobs: arguments, of types that pickle.
        workers: processes at work at a time; 1 for none but this one.
        module: of the experiments folder. The runner of the claims forgets such modules once they are loaded,
            and the processes import it anew.
    """
    if workers == 1:
        for job in jobs:
            yield function(*job)
        return
    with importable(module):
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        pool = ProcessPoolExecutor(
            workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            for future in [pool.submit(function, *job) for job in jobs]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def importable(module: ModuleType) -> Iterator[None]:
    """Inside, other processes find the module by its name: it is registered, its folder on their path."""
    folder, before = str(Path(str(module.__file__)).parent), sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
