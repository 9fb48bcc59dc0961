"""What the benchmarks share about a machine: copy bandwidth, CUDA graphs, a flush of its caches, threads."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FLUSH = 2**28  # bytes, several times the second-level cache of a GPU


def copy_bandwidth(device: str, size: int = 2**28, repeats: int = 7) -> float:
    """Bytes per second, read plus written, of copying a block far larger than the caches.

    Args:
        device: "cpu" or a CUDA device.
        size: bytes.
        repeats: timed copies, after one that is not.
    """
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
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
    """Overwrites more memory than a GPU caches; None on the CPU, where a loop of calls is timed."""
    if not device.startswith("cuda"):
        return None
    return torch.empty(FLUSH, dtype=torch.uint8, device=device).zero_
