"""C7: time of one decode step against the length of the cache, TPA beside MHA and GQA in one process.

h = 32 heads of D = 64, one query, nothing but attention: MHA and GQA-4 by torch's attention on contiguous
(1, G, M, D) caches, TPA (16,1,1) from its records. GQA is timed in two forms: as torch offers it
(`enable_gqa`), and with the heads of a group folded into query rows, which a careful user would write, since
it reads each group once. On the CPU float32 and one thread; on a GPU bfloat16, each call a CUDA graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tenfold_tools import bench
from tenfold_tools.stats import Estimate, bootstrap_interval
from tpa_attention.torch.factors import RecordLayout
from tpa_attention.torch.functional import tpa_decode

HEADS, WIDTH, GROUPS, RANKS = 32, 64, 4, (16, 1, 1)
TPA, MHA, GQA, FOLDED = "TPA (16,1,1)", "MHA, SDPA", "GQA-4, SDPA", "GQA-4, SDPA, groups folded"
FLUSH = 2**28  # bytes, several times the second-level cache of a GPU


@dataclass(frozen=True)
class Length:
    """Timings of all alternatives at one length of the cache.

    Attributes:
        tokens: M.
        seconds: alternative -> one time per round.
        ratios: alternative -> its time over TPA's, paired by round.
    """

    tokens: int
    seconds: dict[str, tuple[float, ...]]
    ratios: dict[str, Estimate]

    def median(self, name: str) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds[name]))


def measure(tokens: int, repeats: int, device: str) -> Length:
    """Interleaved timings at one length.

    Args:
        tokens: M.
        repeats: rounds.
        device: "cpu" or a CUDA device.

    Raises:
        RuntimeError: if an alternative failed.
    """
    on_gpu = device.startswith("cuda")
    calls = alternatives(tokens, device)
    with torch.no_grad(), one_thread():
        if on_gpu:
            calls = {name: captured(call) for name, call in calls.items()}
        found = bench.compare(
            calls,
            baseline=TPA,
            repeats=repeats,
            warmup=1,
            min_time=0.0 if on_gpu else 0.02,  # a loop would find its cache in the GPU's
            device=device,
            setup=flusher(device) if on_gpu else None,
        )
    seconds, ratios = {}, {}
    for row in found.rows:
        if row.ratio is None:
            raise RuntimeError(f"{row.name} at {tokens} tokens: {row.error or 'TPA could not be timed'}")
        seconds[row.name], ratios[row.name] = row.seconds, row.ratio
    return Length(tokens, seconds, ratios)


def alternatives(tokens: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """One decode step of every mechanism on random caches."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    layout = RecordLayout(1, HEADS, WIDTH)
    aq, bq = draw(1, 1, RANKS[0], HEADS), draw(1, 1, RANKS[0], WIDTH)
    records = [draw(1, tokens, layout.padded(dtype.itemsize)) for _ in range(2)]
    q = draw(1, HEADS, 1, WIDTH)
    k, v, k_groups, v_groups = (draw(1, g, tokens, WIDTH) for g in (HEADS, HEADS, GROUPS, GROUPS))
    folded = q.view(1, GROUPS, HEADS // GROUPS, WIDTH)
    attend = functional.scaled_dot_product_attention
    return {
        TPA: lambda: tpa_decode(aq, bq, *records, ranks=RANKS[1:], num_heads=HEADS, head_dim=WIDTH),
        MHA: lambda: attend(q, k, v),
        GQA: lambda: attend(q, k_groups, v_groups, enable_gqa=True),
        FOLDED: lambda: attend(folded, k_groups, v_groups),
    }


def slope_difference(lengths: list[Length], name: str) -> Estimate:
    """Seconds per cached token that TPA adds less another's: median over rounds of fitted slopes.

    Negative where TPA's time grows more slowly.
    """
    tokens = [length.tokens for length in lengths]

    def slopes(which: str) -> Any:
        rounds = np.array([length.seconds[which] for length in lengths])  # (lengths, rounds)
        return np.polyfit(tokens, rounds, 1)[0]

    samples = slopes(TPA) - slopes(name)
    low, high = bootstrap_interval(samples, np.median, method="percentile")
    return Estimate(float(np.median(samples)), low, high)


def slope(lengths: list[Length], name: str) -> float:
    """Seconds per cached token, fitted to the medians."""
    return float(np.polyfit([length.tokens for length in lengths], [x.median(name) for x in lengths], 1)[0])


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
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


def flusher(device: str) -> Callable[[], Any]:
    """Overwrites more memory than the GPU caches."""
    block = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    return block.zero_
