"""Measures how the decode kernel is best cut on this GPU and writes the winners to the kernel's table.

A cut is tile sizes, warps, stages, query form and programs per multiprocessor (`kernels.decode_config.Cut`).
For every shape of the benchmarks a short list of cuts is tried: compiled beforehand by processes side by
side, since compiling is what takes time; compared with the output of the first; timed by CUDA graphs in
interleaved rounds, the caches flushed before each. What does not run (shared memory, registers) or disagrees
is left out with a note. The winner has the least product of medians over the sizes of its bucket.

Run: `python benchmarks/bench_decode.py --device cuda --tune`, on a GPU without other work.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from memory import captured, copy_bandwidth, flusher, reason
from torch import Tensor

from tenfold_tools._comparison import write_text
from tpa_attention.torch.factors import RecordLayout
from tpa_attention.torch.kernels import decode_config
from tpa_attention.torch.kernels.decode_config import Cut, Shape, choose_cut, padded_rows

Call = Callable[..., tuple[Tensor, Tensor]]
UNFIT = ("OutOfResources", "CompilationError", "PTXASError")
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_ERROR = 2e-2  # relative, of outputs whose q, weights and results are rounded to 2^-8


@dataclass(frozen=True)
class Target:
    """A shape to tune and the sizes, (batch, tokens), at which it is timed.

    Attributes:
        heads: h.
        width: D = E.
        ranks: (R_Q, R_K, R_V); R_Q = 0 for a full Q.
        sizes: of one bucket of lengths.
        kind: "" for bfloat16, "int8" or "fp8".
        tried: cuts at most.
    """

    heads: int
    width: int
    ranks: tuple[int, int, int]
    sizes: tuple[tuple[int, int], ...]
    kind: str = ""
    tried: int = 12

    @property
    def shape(self) -> Shape:
        """Its key in the table."""
        q_rank, k_rank, v_rank = self.ranks
        long = decode_config.is_long(self.sizes[0][1])
        return Shape(
            self.heads, self.width, self.width, q_rank or None, k_rank, v_rank, 1, 1 if self.kind else 2, long
        )

    @property
    def title(self) -> str:
        """In one line."""
        return f"h {self.heads}, D {self.width}, ranks {self.ranks}, {self.kind or 'bf16'}, {self.sizes}"


LARGE = ((8, 2**17), (1, 2**17))
SMALL = ((1, 1024), (1, 2**13))
# the two kinds of 8 bits share an entry: their bytes are the same
TARGETS = [
    *(Target(h, D, (16, 1, 1), LARGE) for h in (32, 64) for D in (64, 128)),
    *(Target(h, D, (16, 2, 2), LARGE, tried=8) for h in (32, 64) for D in (64, 128)),
    *(Target(h, D, (0, 1, 1), LARGE, tried=6) for h in (32, 64) for D in (64, 128)),
    *(Target(h, D, (16, 1, 1), LARGE, "int8", tried=7) for h in (32, 64) for D in (64, 128)),
    *(Target(h, 64, ranks, SMALL, tried=12) for h in (32, 64) for ranks in ((16, 1, 1), (16, 2, 2))),
]


def candidates(shape: Shape) -> list[Cut]:
    """Cuts worth trying, the likeliest first, the rule's own at the head.

    Args:
        shape: to cut.
    """
    rule = replace(choose_cut("rule", shape), factored=False)
    rows = padded_rows(shape)
    warps = max(1, rows // 16)

    def cut(tokens: int, block_rows: int, num_warps: int, stages: int, warps_side_by_side: int) -> Cut:
        programs = max(1, warps_side_by_side // num_warps)
        return Cut(tokens, block_rows, False, num_warps, stages, programs)

    half = max(16, rows // 2)
    found = [
        rule,
        cut(32, rows, warps, 3, 12),
        cut(32, rows, warps, 3, 8),
        cut(64, rows, 2 * warps, 3, 12),
        cut(64, rows, 2 * warps, 3, 8),
        cut(32, half, max(1, half // 16), 3, 12),
        cut(64, rows, warps, 3, 8),
        *([replace(cut(32, rows, warps, 3, 12), factored=True)] if shape.q_rank is not None else []),
        cut(32, rows, warps, 4, 12),
        cut(32, rows, warps, 3, 16),
        cut(128, rows, 2 * warps, 2, 8),
        cut(32, rows, warps, 2, 16),
        cut(64, half, max(1, half // 16), 3, 8),
    ]
    return list(dict.fromkeys(found))


def problem(
    target: Target, batch: int, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Random arguments of `decode_triton`: factors as views of records."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q_rank, *ranks = target.ranks
    h, D = target.heads, target.width
    arguments: dict[str, Any] = {
        "aq": draw(batch, 1, q_rank, h) if q_rank else None,
        "bq": draw(batch, 1, q_rank or h, D),
        "scale": D**-0.5 / (q_rank or 1) / ranks[0],
        "out_scale": 1 / ranks[1],
    }
    for name, rank in zip("kv", ranks, strict=True):
        layout = RecordLayout(rank, h, D)
        record = draw(batch, tokens, layout.padded(1 if target.kind else dtype.itemsize))
        if target.kind:
            arguments[f"{name}_scale"] = torch.full((batch, tokens, rank), 2.0**-10, device=device)
            record = (record * 32).clamp(-127, 127).to(QUANTISED[target.kind])
        arguments[f"a{name}"], arguments[f"b{name}"] = layout.views(record)
    return arguments


def compiled(target: Target, cut: Cut, device: str) -> None:
    """Runs the cut once on few tokens, split as many are: the kernel is then in Triton's cache on disk."""
    from tpa_attention.torch.kernels.decode import decode_triton

    decode_triton(**problem(target, 1, 256, device), cut=cut, num_splits=2)
    torch.cuda.synchronize()


def compile_all(jobs: list[tuple[Target, Cut]], device: str, workers: int, seconds: float) -> dict[Any, str]:
    """Compiles side by side until the time is over; what failed or was not reached, with the reason.

    Args:
        jobs: the most wanted first.
        device: a CUDA device.
        workers: processes.
        seconds: after which nothing new is begun.
    """
    until = time.monotonic() + seconds
    failed: dict[Any, str] = {}
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = {pool.submit(compiled, *job, device): job for job in jobs}
    try:
        for future in as_completed(futures, timeout=max(0.0, until - time.monotonic())):
            error = future.exception()
            if type(error).__name__ in UNFIT:  # of others the timing will say what they are
                failed[futures[future]] = reason(error)
    except TimeoutError:
        failed |= {job: "not compiled in time" for future, job in futures.items() if not future.done()}
    pool.shutdown(wait=True, cancel_futures=True)
    return failed


def measured(
    call: Call, arguments: dict[str, Any], cuts: list[Cut], device: str, rounds: int
) -> tuple[dict[Cut, float], dict[Cut, str]]:
    """Median seconds of each cut, and why others have none.

    Args:
        call: `decode_triton`.
        arguments: its arguments.
        cuts: to compare; outputs are compared with that of the first.
        device: where the arguments are.
        rounds: timings of each, interleaved.
    """
    ready: dict[Cut, Callable[[], Any]] = {}
    failed: dict[Cut, str] = {}
    expected: Tensor | None = None
    for cut in cuts:
        try:
            out = call(**arguments, cut=cut)[0].double()
            expected = out if expected is None else expected
            error = float((out - expected).norm() / expected.norm())
            if not error < LARGEST_ERROR:
                raise ArithmeticError(f"differs by {error:.1e} from the first cut")

            def again(cut: Cut = cut) -> Any:
                return call(**arguments, cut=cut)

            ready[cut] = captured(again) if device.startswith("cuda") else again
        except Exception as problem:  # whatever a compiler says of a cut, others may run
            failed[cut] = reason(problem)
    flush = flusher(device)
    seconds: dict[Cut, list[float]] = {cut: [] for cut in ready}
    for _ in range(rounds):
        for cut, run in ready.items():
            seconds[cut].append(timed(run, flush, device))
    return {cut: statistics.median(times) for cut, times in seconds.items()}, failed


def timed(run: Callable[[], Any], flush: Callable[[], Any] | None, device: str) -> float:
    """Seconds of one call."""
    if flush is None:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    flush()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    run()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ranked(medians: list[dict[Cut, float]]) -> list[tuple[Cut, float]]:
    """Cuts that ran at every size with their distance to the best of each, geometric mean, best first."""
    everywhere = set.intersection(*(set(found) for found in medians))
    distance = {
        cut: math.exp(statistics.fmean(math.log(found[cut] / min(found.values())) for found in medians))
        for cut in everywhere
    }
    return sorted(distance.items(), key=lambda item: item[1])


def tune(
    targets: list[Target],
    device: str,
    file: Path,
    *,
    workers: int = 0,
    seconds: float = 60.0,
    rounds: int = 15,
) -> Iterator[str]:
    """Measures the targets and writes the table after each; lines to print, markdown.

    Args:
        targets: what to tune.
        device: "cuda", or "cpu" where kernels are interpreted.
        file: the table: its other entries stay.
        workers: processes that compile; 0: none, kernels are compiled where they are timed.
        seconds: of compiling at most.
        rounds: timings of each cut.
    """
    from tpa_attention.torch.kernels import decode

    name, processors = decode._device(torch.device(device))
    table = decode_config.load_tuned(file) if file.exists() else {}
    start = time.monotonic()
    plans = {target: candidates(target.shape)[: target.tried] for target in targets}
    longest = max(len(cuts) for cuts in plans.values())
    jobs = [(t, cuts[i]) for i in range(longest) for t, cuts in plans.items() if i < len(cuts)]
    skipped = compile_all(jobs, device, workers, seconds) if workers else {}
    bandwidth = copy_bandwidth(device) if device.startswith("cuda") else math.inf
    took = time.monotonic() - start
    yield f"{name}: {len(jobs)} cuts compiled in {took:.0f} s; copy {bandwidth / 1e9:.0f} GB/s"
    cut_columns = "tokens x rows, query, warps, stages, programs"
    yield f"| shape | cut: {cut_columns} | splits | us, share of copy bandwidth | distance |"
    yield "|---|---|---:|---:|---:|"
    for target, cuts in plans.items():
        medians, notes = [], {cut: why for (t, cut), why in skipped.items() if t == target}
        cuts = [cut for cut in cuts if cut not in notes]
        for batch, tokens in target.sizes:
            arguments = problem(target, batch, tokens, device)
            found, failed = measured(decode.decode_triton, arguments, cuts, device, rounds)
            medians.append(found)
            notes |= failed
            del arguments
        order = ranked(medians)
        if not order:
            yield f"| {target.title} | none ran: {notes} | | | |"
            continue
        table[name, target.shape] = order[0][0]
        write_text(file, decode_config.dump_tuned(table))
        own = choose_cut("rule", target.shape)
        shown = order[:3] + [entry for entry in order[3:] if entry[0] in (own, replace(own, factored=False))]
        for cut, distance in shown:
            rates, splits = [], []
            for (batch, tokens), found in zip(target.sizes, medians, strict=True):
                size = batch * tokens * target.shape.bytes_per_token
                rates.append(f"{found[cut] * 1e6:.1f}, {size / found[cut] / bandwidth:.2f}")
                groups = batch * (padded_rows(target.shape) // cut.block_rows)
                splits.append(
                    decode_config.choose_splits(groups, tokens, cut.block_m, processors * cut.programs)
                )
            form = "factored" if cut.factored else "full"
            text = (
                f"{cut.block_m} x {cut.block_rows}, {form}, {cut.num_warps}, {cut.num_stages}, {cut.programs}"
            )
            yield (
                f"| {target.title} | {text} | {' / '.join(map(str, splits))} | {' / '.join(rates)} "
                f"| {distance:.3f} |"
            )
        for cut, why in notes.items():
            yield f"| {target.title} | {cut} left out: {why} | | | |"
    yield f"\n{len(table)} entries in {file} after {time.monotonic() - start:.0f} s"


def main(device: str, file: Path, only: list[str] | None, seconds: float) -> int:
    """The command line's part: prints as it goes; 2 where there is no GPU, else 0."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.stderr.write(f"--tune measures kernels on a GPU, and torch {torch.__version__} sees none\n")
        return 2
    targets = [t for t in TARGETS if only is None or any(word in t.title for word in only)]
    workers = min(16, os.cpu_count() or 1)
    for line in tune(targets, device, file, workers=workers, seconds=seconds):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0
