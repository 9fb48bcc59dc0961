"""What the benchmarks share about a machine: copy bandwidth, CUDA graphs, a flush of its caches, threads.

Also which of several ways to make one call is the fastest on it: peers come with a choice of backends or tile
sizes, and the best of them is the one to beat.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

FLUSH = 2**28  # bytes, several times the second-level cache of a GPU


def copy_bandwidth(device: str, size: int | None = None, repeats: int = 7) -> float:
    """Bytes per second, read plus written, of copying a block far larger than the caches.

    Args:
        device: "cpu" or a CUDA device.
        size: bytes; by default 2^28 on the CPU, 2^30 on a GPU, where a launch must not count.
        repeats: timed copies, after one that is not.
    """
    size = size or (2**30 if device.startswith("cuda") else 2**28)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    if source.is_cuda:
        seconds = _event_seconds(lambda: target.copy_(source), device, repeats)
        del source, target
        torch.cuda.empty_cache()
        return 2 * size / statistics.median(seconds)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[1:])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch computes with so many threads inside; None leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: its kernels without the host's work of launching them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def flusher(device: str) -> Callable[[], Any] | None:
    """Reads more memory than a GPU caches; None on the CPU, where a loop of calls is timed.

    Written lines would stay in the cache until the call that is timed has to write them back, 50 MB of them.
    """
    if not device.startswith("cuda"):
        return None
    return torch.zeros(FLUSH // 4, device=device).sum


def fastest(
    ways: Mapping[str, Callable[[], Any]], device: str, tries: int = 5
) -> tuple[str, Callable[[], Any]]:
    """Name and call of the way that took the least median time, on the CPU of the first that runs.

    Args:
        ways: calls without arguments that compute the same.
        device: "cpu" or a CUDA device.
        tries: timed calls of each, after two that are not.

    Raises:
        RuntimeError: if none runs, with what each said.
    """
    medians: dict[str, float] = {}
    problems: list[str] = []
    for name, call in ways.items():
        try:
            if not device.startswith("cuda"):
                call()
                return name, call
            medians[name] = statistics.median(_event_seconds(call, device, tries))
        except Exception as problem:  # a backend that cannot is no failure while another can
            problems.append(f"{name}: {reason(problem)}")
    if not medians:
        raise RuntimeError(f"none of {list(ways)} runs: {problems}")
    best = min(medians, key=lambda name: medians[name])
    return best, ways[best]


def reason(problem: BaseException) -> str:
    """Kind and first line of what was raised."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"


def _event_seconds(call: Callable[[], Any], device: str, tries: int) -> list[float]:
    for _ in range(2):
        call()
    seconds = []
    for _ in range(tries):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def kernels_of(call: Callable[[], Any]) -> int:
    """Kernels that one call launches on the GPU, as the profiler counts them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events())
