"""One optimiser step of MARS against other optimisers, interleaved in one process.

Every contender works on the same parameters and gradients and has its own state: torch's AdamW and Muon, the
backends of MARS, other implementations of MARS where they are installed (`peers.py`), and the jitted steps
of mars_optim.jax and optax on copies (`jax_steps.py`). A peer that is not there is named with the reason.

The bytes floor is the time in which memory can move what an update must read and write, at the copy bandwidth
measured in the same run: no step whose state lies in memory beats it. The share of that speed which a step
reaches is left empty for sets that fit in a cache, and for orthogonalised types, which arithmetic bounds. The
last column relates a step to its counterpart, which does the same without the correction on the same backend:
fused MARS to fused AdamW, mars-m to Muon, the jitted step to optax.adamw.

Peak memory of a JAX step on a GPU reads 0, because torch does not see what XLA allocates.

Run: `python benchmarks/bench_step.py --set gpt2-small --repeats 20 --json steps.json --markdown steps.md`
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import BASELINE, Contender, Shapes, torch_contenders
from jax_steps import jax_contenders, wait
from peers import peer_contenders
from torch import Tensor

from tenfold_tools.bench import Comparison, Options, Row, main
from tenfold_tools.stats import paired_ratio

FLOAT_BYTES = 4
DESCRIPTION = (
    "One step of MARS against AdamW, Muon, optax and other implementations of MARS. All contenders stay in "
    "memory together, each with its state: about 30 GB for gpt2-small or one-100M unless --only chooses."
)


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Shapes of a GPT-2 with biases and a tied head: 4 + 12 per layer tensors."""
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


SETS: dict[str, list[tuple[int, ...]]] = {
    "pair": [(16, 8), (8,)],  # for the test of this benchmark
    "tiny": gpt2(layers=2, width=64, vocabulary=256, context=64),
    "many-4k": [(64, 64)] * 1000,
    "gpt2-small": gpt2(layers=12, width=768, vocabulary=50257, context=1024),
    "one-100M": [(10_000, 10_000)],
}


def measure(
    name: str, options: Options, *, only: str | None = None, official: Sequence[Path] = ()
) -> Comparison:
    """Times one step of every contender on a parameter set.

    Args:
        name: key of SETS.
        options: of the harness.
        only: regular expression; contenders whose name it finds, with their counterparts. None takes all.
        official: files of the authors' release, which are executed.
    """
    shapes = SETS[name]
    lineup, absent = contenders(shapes, options.device, only, official)
    params = parameters(shapes, options.device)
    count = sum(param.numel() for param in params)
    floor = FLOAT_BYTES * count / copy_bandwidth(options.device)
    beyond_caches = FLOAT_BYTES * count >= 2**28

    def of_floor(row: Row) -> str:
        streams = lineup[row.name].streams
        return "" if streams is None or not beyond_caches else f"{streams * floor / row.median:.2f}"

    comparison = options.compare(
        {label: stepper(contender, params) for label, contender in lineup.items()},
        baseline=BASELINE,
        title=f"{name}: {len(shapes)} tensors, {count / 1e6:.2f} M parameters, "
        f"copy bandwidth {FLOAT_BYTES / floor * count / 1e9:.1f} GB/s",
        sync=wait,
    )
    comparison = comparison.with_column("share of the bytes floor", of_floor)
    return comparison.with_column("ratio to its counterpart", against(comparison, lineup)).with_absent(absent)


def contenders(
    shapes: Shapes, device: str, only: str | None, official: Sequence[Path]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """What is compared on parameters of these shapes, the baseline first, and what is missing."""
    lineup: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for found, missing in (
        torch_contenders(shapes, device),
        peer_contenders(device, official),
        jax_contenders(shapes, device),
    ):
        lineup |= found
        absent |= missing
    if only is None:
        return lineup, absent
    wanted = {label for label in lineup if re.search(only, label)} | {BASELINE}
    wanted |= {lineup[label].against for label in wanted}
    return (
        {label: contender for label, contender in lineup.items() if label in wanted},
        {label: reason for label, reason in absent.items() if re.search(only, label)},
    )


def parameters(shapes: Shapes, device: str) -> list[Tensor]:
    """Normal parameters with normal gradients, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        param = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device))
        param.grad = 0.01 * torch.randn(shape, generator=generator).to(device)
        params.append(param)
    return params


def stepper(contender: Contender, params: list[Tensor]) -> Callable[[], Any]:
    """A step whose optimiser is built when its warm-up begins, so a failure to build is one row's."""
    built: list[Callable[[], Any]] = []

    def step() -> Any:
        if not built:
            built.append(contender.build(params))
        return built[0]()

    return step


def against(comparison: Comparison, lineup: Mapping[str, Contender]) -> Callable[[Row], str]:
    """Text of a row's time relative to its counterpart's; empty where that is the baseline of the table."""

    def text(row: Row) -> str:
        name = lineup[row.name].against
        if name == BASELINE or name not in lineup or comparison.row(name).error is not None:
            return ""
        ratio = paired_ratio(row.seconds, comparison.row(name).seconds)
        return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) {name}"

    return text


def copy_bandwidth(device: str, size: int = 2**28, repeats: int = 7) -> float:
    """Bytes per second, read plus written, of copying a tensor far larger than the caches."""
    source, target = (torch.ones(size // FLOAT_BYTES, device=device) for _ in range(2))
    seconds = list(_timed_copies(source, target, repeats + 1))[1:]
    return 2 * size / statistics.median(seconds)


def _timed_copies(source: Tensor, target: Tensor, repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        yield time.perf_counter() - start


def own_options() -> argparse.ArgumentParser:
    """Options of this benchmark beside those of the harness."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--only", metavar="REGEX", help="contenders whose name this finds, and their counterparts"
    )
    parser.add_argument(
        "--official",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="Python files of the authors' release (mars.py, mars_fused.py) on your disk; this EXECUTES them",
    )
    return parser


if __name__ == "__main__":
    own, _ = own_options().parse_known_args()
    sys.exit(
        main(
            partial(measure, only=own.only, official=own.official),
            workloads=list(SETS),
            default=["tiny"],
            description=DESCRIPTION,
            parents=[own_options()],
        )
    )
