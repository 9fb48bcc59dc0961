"""One optimiser step of MARS against torch's AdamW and Muon, interleaved in one process.

Every contender works on the same parameters and gradients and has its own state. The bytes floor is the time
in which memory can move what an update must read and write, at the copy bandwidth measured in the same run:
no step whose state lies in memory beats it. The last column is the share of that speed the step reaches, 1
being the floor. It is left empty for sets that fit in a cache, and for orthogonalised types, which arithmetic
bounds.

Run: `python benchmarks/bench_step.py --set gpt2-small --repeats 20 --json steps.json --markdown steps.md`
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mars_optim.torch import MARS
from tenfold_tools.bench import Comparison, Options, Row, main

FLOAT_BYTES = 4
BASELINE = "AdamW foreach"
# Muon orthogonalises in bfloat16. A CPU without instructions for it took 0.2 s for the 2e8 operations of the
# tiny set; many-4k has 44 times as many.
CPU_FLOPS = 1e9


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Shapes of a GPT-2 with biases and a tied head: 4 + 12 per layer tensors."""
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


SETS: dict[str, list[tuple[int, ...]]] = {
    "tiny": gpt2(layers=2, width=64, vocabulary=256, context=64),
    "gpt2-small": gpt2(layers=12, width=768, vocabulary=50257, context=1024),
    "one-100M": [(10_000, 10_000)],
    "many-4k": [(64, 64)] * 1000,
}


@dataclass(frozen=True)
class Contender:
    """An optimiser on a list of parameters, with the least its update must move.

    Attributes:
        build: from parameters to the optimiser.
        streams: floats read or written per parameter (spec section e); None where arithmetic is the limit.
    """

    build: Callable[[list[Tensor]], Any]
    streams: int | None


def contenders(shapes: list[tuple[int, ...]], device: str) -> dict[str, Contender]:
    """What is compared on parameters of these shapes, the baseline first."""
    lineup = {
        "AdamW foreach": Contender(lambda params: torch.optim.AdamW(params, foreach=True), 7),
        "AdamW for-loop": Contender(lambda params: torch.optim.AdamW(params, foreach=False), 7),
        "AdamW fused": Contender(lambda params: torch.optim.AdamW(params, fused=True), 7),
    }
    for mars_type, clip, streams in (("mars-adamw", 1.0, 9), ("mars-adamw", None, 9), ("mars-lion", 1.0, 7)):
        for backend in ("foreach", "for-loop", "fused"):
            fused = backend == "fused"
            options = {"mars_type": mars_type, "clip": clip, "foreach": backend == "foreach", "fused": fused}
            label = f"{mars_type} {backend}, clip={clip}"
            lineup[label] = Contender(lambda params, options=options: MARS(params, **options), streams)
    if 0 < orthogonalisation_flops(shapes) <= (CPU_FLOPS if device == "cpu" else math.inf):
        lineup["mars-shampoo foreach"] = Contender(lambda params: shampoo(params, foreach=True), None)
        lineup["mars-shampoo for-loop"] = Contender(lambda params: shampoo(params, foreach=False), None)
        if hasattr(torch.optim, "Muon"):
            lineup["Muon, AdamW foreach on the rest"] = Contender(Muon, None)
    return lineup


def shampoo(params: list[Tensor], *, foreach: bool) -> MARS:
    """MARS-Shampoo on the hidden matrices, AdamW on embeddings and vectors."""
    groups = [
        {"params": [p for p in params if is_hidden(p.shape)]},
        {"params": [p for p in params if not is_hidden(p.shape)], "algorithm": "adamw"},
    ]
    return MARS([group for group in groups if group["params"]], mars_type="mars-shampoo", foreach=foreach)


class Muon:
    """torch.optim.Muon (torch >= 2.9) on the hidden matrices, AdamW on the rest: the work of `shampoo`."""

    def __init__(self, params: list[Tensor]) -> None:
        rest = [p for p in params if not is_hidden(p.shape)]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon([p for p in params if is_hidden(p.shape)], lr=1e-3)
        ]
        if rest:
            self._parts.append(torch.optim.AdamW(rest, foreach=True))

    def step(self) -> None:
        """One step of both parts."""
        for part in self._parts:
            part.step()


def is_hidden(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that is usually orthogonalised: no embedding, none of 10^8 entries."""
    return len(shape) == 2 and max(shape) <= 4096


def orthogonalisation_flops(shapes: list[tuple[int, ...]]) -> int:
    """Operations of five Newton-Schulz steps on all hidden matrices (spec section e)."""
    sizes = [(min(shape), max(shape)) for shape in shapes if is_hidden(shape)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sizes)


def measure(name: str, options: Options) -> Comparison:
    """Times one step of every contender on a parameter set."""
    shapes = SETS[name]
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(options.device))
        param.grad = 0.01 * torch.randn(shape, generator=generator).to(options.device)
        params.append(param)
    count = sum(p.numel() for p in params)
    floor = FLOAT_BYTES * count / copy_bandwidth(options.device)
    lineup = contenders(shapes, options.device)
    beyond_caches = FLOAT_BYTES * count >= 2**28

    # Steps are lazy: the optimiser is built when its warm-up begins, so a failure to build is one row's.
    def stepper(contender: Contender) -> Callable[[], None]:
        built: list[Any] = []

        def step() -> None:
            if not built:
                built.append(contender.build(params))
            built[0].step()

        return step

    def of_floor(row: Row) -> str:
        streams = lineup[row.name].streams
        return "" if streams is None or not beyond_caches else f"{streams * floor / row.median:.2f}"

    comparison = options.compare(
        {label: stepper(contender) for label, contender in lineup.items()},
        baseline=BASELINE,
        title=f"{name}: {len(shapes)} tensors, {count / 1e6:.2f} M parameters, "
        f"copy bandwidth {FLOAT_BYTES / floor * count / 1e9:.1f} GB/s",
    )
    return comparison.with_column("share of the bytes floor", of_floor)


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


if __name__ == "__main__":
    description = "One step of MARS against AdamW and Muon."
    sys.exit(main(measure, workloads=list(SETS), default=["tiny"], description=description))
