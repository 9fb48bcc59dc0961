"""One decode step of TPA against MHA, GQA, MQA and MLA, interleaved in one process.

Attention alone, without projections: on the CPU float32 on one thread, on a GPU bfloat16 with every call in
a CUDA graph and the caches flushed before each timing. A table has the bytes of cache that a step must read,
the bandwidth it reaches, the share of the bytes floor (the time in which memory copies as many bytes,
measured in the same run) and the largest error of one sequence against float64.

At the bandwidth limit TPA of rank 1 reads 192 numbers per token where GQA-4 reads 512, MHA 4096, MLA 288, and
MQA 128 (h = 32, D = 64): it cannot beat MQA there.

Run: `python benchmarks/bench_decode.py --set 4k 32k --repeats 9 --json decode.json --markdown decode.md`
On a GPU: `python benchmarks/bench_decode.py --device cuda --tune` once, then
`python benchmarks/bench_decode.py --device cuda --grid gpu --repeats 50 --json decode.json`, and for the
paper's figure `--grid paper` and `python benchmarks/plot_decode.py decode.json decode.svg`.
"""

import argparse
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import BASELINE, Contender, Step, Workload, contenders
from memory import captured, copy_bandwidth, flusher, kernels_of, threads
from peers import peer_contenders

from tenfold_tools.bench import Comparison, Options, Row, main

DESCRIPTION = (
    "One decode step of TPA against MHA, GQA, MQA, MLA and the kernels of other packages. All caches of a "
    "set stay in memory together."
)
CPU_SETS = {"tiny": Workload(96, heads=4, width=8, groups=2, latent=16, rotary=4)} | {
    f"{size}k": Workload(1024 * size) for size in (4, 8, 16, 32, 64)
}
GPU_SETS = {
    "launch": Workload(1024),
    "8k": Workload(2**13),
    "32k": Workload(2**15),
    "128k": Workload(2**17),
    "512k": Workload(2**19),
    "1M": Workload(2**17, batch=8),
    "1M-d128": Workload(2**17, batch=8, width=128),
    "1M-h64-d128": Workload(2**17, batch=8, heads=64, width=128, groups=8, latent=512, rotary=64),
}
PAPER_GRID = {
    f"d{d_model}-b{batch}-2^{power}": Workload(2**power, batch=batch, heads=d_model // 64)
    for d_model in (1024, 2048, 3072)
    for batch in (1, 2, 4, 8, 16)
    for power in range(12, 20)
}
PAPER_SMALL = {
    name: work
    for name, work in PAPER_GRID.items()
    if work.heads == 32 and work.batch in (1, 16) and work.tokens in (2**12, 2**14, 2**16, 2**18)
}
GRIDS = {"cpu": CPU_SETS, "gpu": GPU_SETS, "paper": PAPER_GRID, "paper-small": PAPER_SMALL}
DEFAULTS = {name: list(sets) for name, sets in GRIDS.items()} | {"cpu": ["4k", "8k", "16k", "32k", "64k"]}


def measure(name: str, options: Options, *, only: str | None = None, one_thread: bool = True) -> Comparison:
    """Times one decode step of every contender on a set.

    Args:
        name: key of one of GRIDS.
        options: of the harness.
        only: regular expression; contenders whose name it finds, and the baseline. None takes all.
        one_thread: whether the CPU works on one thread; otherwise on torch's number.
    """
    on_gpu = options.device.startswith("cuda")
    work = next(sets[name] for sets in GRIDS.values() if name in sets)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    lineup, absent = chosen(work, options.device, dtype, only)
    steps = {label: once(contender.build) for label, contender in lineup.items()}
    with torch.no_grad(), threads(1 if one_thread and not on_gpu else None):
        bandwidth = copy_bandwidth(options.device)
        comparison = (replace(options, min_time=0.0) if on_gpu else options).compare(
            {label: runner(step, on_gpu) for label, step in steps.items()},
            baseline=BASELINE,
            title=f"{name}: {work.title}, {dtype}, copy bandwidth {bandwidth / 1e9:.1f} GB/s",
            setup=flusher(options.device),
        )
        columns: dict[str, Callable[[Row], str]] = {
            "numbers per token": lambda row: str(lineup[row.name].numbers),
            "MiB read": lambda row: f"{steps[row.name]().bytes / 2**20:.2f}",
            "GB/s": lambda row: f"{steps[row.name]().bytes / row.median / 1e9:.1f}",
            "share of the bytes floor": lambda row: f"{steps[row.name]().bytes / row.median / bandwidth:.2f}",
            "error": lambda row: f"{steps[row.name]().error():.1e}",
        }
        if on_gpu:
            if name == "launch":
                columns["kernels"] = lambda row: str(kernels_of(steps[row.name]().call))
            columns["note"] = lambda row: steps[row.name]().note
        for title, text in columns.items():
            comparison = comparison.with_column(title, text)
    return comparison.with_absent(absent)


def chosen(
    work: Workload, device: str, dtype: torch.dtype, only: str | None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """What is compared, the baseline first, and what is missing or does not fit with the reason."""
    lineup = contenders(work, device, dtype)
    peers, absent = peer_contenders(work, device, dtype)
    lineup |= peers
    if only is not None:
        lineup = {n: c for n, c in lineup.items() if n == BASELINE or re.search(only, n)}
        absent = {n: reason for n, reason in absent.items() if re.search(only, n)}
    room = free_bytes(device)
    if room is None:
        return lineup, absent
    # the smallest caches first: one that is too large leaves the others in
    for label, contender in sorted(lineup.items(), key=lambda item: item[1].numbers):
        size = contender.numbers * work.batch * work.tokens * dtype.itemsize
        room -= size
        if room < 0:
            del lineup[label]
            absent[label] = f"left out: its cache of {size / 2**30:.1f} GiB does not fit beside the others"
            room += size
    return lineup, absent


def free_bytes(device: str) -> int | None:
    """What may be filled with caches: 80 % of what a GPU has free; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    gc.collect()
    torch.cuda.empty_cache()  # what the set before held
    return int(0.8 * torch.cuda.mem_get_info(device)[0])


def once(build: Callable[[], Step]) -> Callable[[], Step]:
    """The step, built at the first call: a failure to build is one row's."""
    built: list[Step] = []

    def step() -> Step:
        if not built:
            built.append(build())
        return built[0]

    return step


def runner(step: Callable[[], Step], on_gpu: bool) -> Callable[[], Any]:
    """The call that is timed, captured at the first call where that is possible."""
    ready: list[Callable[[], Any]] = []

    def run() -> Any:
        if not ready:
            made = step()
            ready.append(captured(made.call) if on_gpu and made.capturable else made.call)
        return ready[0]()

    return run


def tune(rest: list[str], own: argparse.Namespace) -> int:
    """Measures cuts; of the harness's options it takes --device and, as words of titles, --set."""
    import tune_decode  # needs triton

    from tpa_attention.torch.kernels.decode_config import TUNED_FILE

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", nargs="+")
    given = parser.parse_args(rest)
    return tune_decode.main(given.device, own.tuned or TUNED_FILE, given.set, own.tune_seconds)


def own_options() -> argparse.ArgumentParser:
    """Options of this benchmark beside those of the harness."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--grid", choices=list(GRIDS), default="cpu", help="which sets there are")
    parser.add_argument("--only", metavar="REGEX", help="contenders whose name this finds, and the baseline")
    parser.add_argument("--tune", action="store_true", help="measure how to cut the kernel, nothing else")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="table to write instead of the package's")
    parser.add_argument("--tune-seconds", type=float, default=60.0, help="of compiling (default %(default)s)")
    parser.add_argument("--all-threads", action="store_true", help="on the CPU, not one thread alone")
    return parser


if __name__ == "__main__":
    own, rest = own_options().parse_known_args()
    if own.tune:
        sys.exit(tune(rest, own))
    sys.exit(
        main(
            partial(measure, only=own.only, one_thread=not own.all_threads),
            workloads=list(GRIDS[own.grid]),
            default=DEFAULTS[own.grid],
            description=DESCRIPTION,
            parents=[own_options()],
        )
    )
