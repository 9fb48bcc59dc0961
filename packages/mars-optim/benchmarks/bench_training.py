"""Training speed of a byte-level GPT: tokens per second under AdamW and under both forms of MARS.

The approximate form adds work to the optimiser step alone. The exact form also needs the gradient of the
batch at the previous parameters, one more forward and backward pass per step: way 1 as `with
optimizer.at_previous_params()`, way 2 as a closure that `step` calls twice. Each contender trains its own
copy of the same model on the same batches, with gradients cleared before each pass. All is interleaved in one
process.

Run: `python benchmarks/bench_training.py --set small medium --repeats 20 --json training.json`
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from contenders import fused_problem
from torch import Tensor

from mars_optim.torch import MARS
from tenfold_tools import data
from tenfold_tools.bench import Comparison, Options, main
from tenfold_tools.workloads import Batch, ByteGPT, GPTConfig, cross_entropy, token_batches

BASELINE = "AdamW foreach"
FUSED = "MARS approximate, fused"
RATE = 1e-3
DIFFERENT_BATCHES = 8  # a pass over the same batch again could find its embeddings in the cache


@dataclass(frozen=True)
class Workload:
    """A model and the size of a batch.

    Attributes:
        model: size of the GPT.
        batch: windows per batch, each as long as the model's context.
    """

    model: GPTConfig
    batch: int = 16

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.model.context


SETS = {
    "small": Workload(GPTConfig()),  # the model of the claims R6 to R8
    "medium": Workload(GPTConfig(width=256, layers=4, heads=8, context=128)),
    # as wide and deep as GPT-2 small, for a GPU
    "gpt2-small": Workload(GPTConfig(width=768, layers=12, heads=12, context=1024), batch=8),
}


@dataclass(frozen=True)
class Training:
    """One model in training: what a step function needs."""

    model: ByteGPT
    optimizer: Any
    batches: Iterator[Batch]

    def gradient(self) -> Tensor:
        """Fresh gradients of the next batch."""
        return self.gradient_of(next(self.batches))

    def gradient_of(self, batch: Batch) -> Tensor:
        """Fresh gradients of a batch."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model, batch)
        loss.backward()
        return loss


def one_pass(training: Training) -> None:
    """A step with one gradient: AdamW, and MARS in the approximate form."""
    training.gradient()
    training.optimizer.step()


def two_passes(training: Training) -> None:
    """The exact form, way 1."""
    batch = next(training.batches)
    training.optimizer.zero_grad()
    with training.optimizer.at_previous_params():
        training.gradient_of(batch)
    training.gradient_of(batch)
    training.optimizer.step()


def closure(training: Training) -> None:
    """The exact form, way 2."""
    batch = next(training.batches)
    training.optimizer.step(lambda: training.gradient_of(batch))


Make = Callable[[Any], torch.optim.Optimizer]

CONTENDERS: dict[str, tuple[Make, Callable[[Training], None]]] = {
    BASELINE: (lambda params: torch.optim.AdamW(params, lr=RATE, foreach=True), one_pass),
    "MARS approximate, foreach": (lambda params: MARS(params, lr=RATE, foreach=True), one_pass),
    FUSED: (lambda params: MARS(params, lr=RATE, fused=True), one_pass),
    "MARS exact, at_previous_params": (
        lambda params: MARS(params, lr=RATE, is_approx=False, foreach=True),
        two_passes,
    ),
    "MARS exact, closure": (lambda params: MARS(params, lr=RATE, is_approx=False, foreach=True), closure),
}


def measure(name: str, options: Options) -> Comparison:
    """Times one training step of every contender on a workload."""
    workload = SETS[name]
    batches = list(
        token_batches(
            data.stdlib_source().train,
            steps=DIFFERENT_BATCHES,
            batch=workload.batch,
            context=workload.model.context,
            generator=torch.Generator().manual_seed(0),
            device=options.device,
        )
    )

    def step(make: Make, once: Callable[[Training], None]) -> Callable[[], None]:
        model = ByteGPT(workload.model, torch.Generator().manual_seed(1)).to(options.device)
        training = Training(model, make(model.parameters()), cycle(batches))
        return lambda: once(training)

    lineup = dict(CONTENDERS)
    problem = fused_problem(options.device)
    if problem is not None:
        del lineup[FUSED]
    size = sum(param.numel() for param in ByteGPT(workload.model, torch.Generator()).parameters())
    comparison = options.compare(
        {label: step(*contender) for label, contender in lineup.items()},
        baseline=BASELINE,
        title=f"{name}: byte-level GPT of {size / 1e6:.2f} M parameters, {workload.tokens} tokens per step",
    )
    comparison = comparison.with_column("tokens/s", lambda row: f"{workload.tokens / row.median:.0f}")
    return comparison.with_absent({} if problem is None else {FUSED: f"not available: {problem}"})


if __name__ == "__main__":
    description = "Tokens per second of AdamW and of both forms of MARS on a byte-level GPT."
    sys.exit(main(measure, workloads=list(SETS), default=["small"], description=description))
