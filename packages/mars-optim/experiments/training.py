"""Training runs for the claims: a digits MLP and a byte-level GPT, under one arm and one seed at a time.

An arm is a frozen description of an optimiser, which goes into the report as the configuration. Within a seed
all arms share the data split, the initial weights and the batches, so their differences are paired.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mars_optim.torch import MARS
from tenfold_tools import data
from tenfold_tools.claims import Run
from tenfold_tools.workloads import (
    Batch,
    ByteGPT,
    DigitsMLP,
    GPTConfig,
    cross_entropy,
    evaluate,
    linear_decay,
    sample_batches,
    token_batches,
    token_windows,
    train,
    warmup_cosine,
)


@dataclass(frozen=True)
class Arm:
    """An optimiser and its hyperparameters.

    Attributes:
        name: as the report shows it.
        optimizer: "MARS" or "AdamW".
        lr: peak learning rate of the matrices.
        lr_1d: peak learning rate of vectors (MARS); AdamW uses lr for all.
        betas: decay of both moments.
        weight_decay: of everything.
        mars_type: type of the MARS optimiser.
        gamma: correction strength.
        is_approx: form of the correction.
        steps: how many times the workload's steps are run.
    """

    name: str
    optimizer: str
    lr: float
    lr_1d: float
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float | None = None
    mars_type: str = "mars-adamw"
    gamma: float = 0.025
    is_approx: bool = True
    steps: int = 1

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the model's parameters."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=self.betas, **decay)
        if decay:
            decay["weight_decay_1d"] = self.weight_decay
        return MARS(
            model.parameters(),
            lr=self.lr,
            lr_1d=self.lr_1d,
            betas=self.betas,
            mars_type=self.mars_type,
            gamma=self.gamma,
            is_approx=self.is_approx,
            **decay,
        )


def configuration(arm: Arm, seed: int, **more: Any) -> dict[str, Any]:
    """What the report records of one run."""
    return asdict(arm) | {"seed": seed} | more


def previous_gradient_pass(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None
) -> Callable[[Batch], None] | None:
    """Way 1 of supplying h_t, for the training loop; None where the arm needs no second pass."""
    if not isinstance(optimizer, MARS) or optimizer.param_groups[0]["is_approx"]:
        return None

    def extra_pass(batch: Batch) -> None:
        with optimizer.at_previous_params():
            cross_entropy(model, batch).backward()
            if clip_norm is not None:  # h_t is clipped as g_t is, as in the authors' training script
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)

    return extra_pass


def train_digits(arm: Arm, seed: int, device: str) -> tuple[float, float]:
    """Final loss of a 64-64-64-10 network on its training and its held-out digits: 300 steps of 16."""
    steps, generator = 300, torch.Generator().manual_seed(seed)
    train_set, test_set = (
        (torch.from_numpy(inputs).float().to(device), torch.from_numpy(targets).to(device))
        for inputs, targets in data.split(data.digits(), 0.2, np.random.default_rng(seed))
    )
    model = DigitsMLP(generator).to(device)
    optimizer = arm.build(model)
    train(
        model,
        optimizer,
        sample_batches(*train_set, steps=steps, batch=16, generator=generator),
        rate=linear_decay(steps),
        before_backward=previous_gradient_pass(model, optimizer, None),
    )
    return evaluate(model, [train_set])[0], evaluate(model, [test_set])[0]


@dataclass(frozen=True)
class LanguageRun:
    """How long a language model is trained and how much held-out text it is judged on.

    Attributes:
        steps: optimiser steps of an arm with `steps=1`.
        windows: held-out windows of 64 bytes; None for all of the 100 kB.
        device: where it runs.
    """

    steps: int = 400
    windows: int | None = None
    device: str = "cpu"


def train_language_model(arm: Arm, seed: int, text: data.ByteText, run: LanguageRun) -> float:
    """Final held-out loss (nats per byte) of the byte-level GPT: 16 x 64 bytes a step, warm-up, cosine."""
    config, steps, clip_norm = GPTConfig(), run.steps * arm.steps, 1.0
    generator = torch.Generator().manual_seed(seed)
    model = ByteGPT(config, generator).to(run.device)
    optimizer = arm.build(model)
    batches = token_batches(
        text.train,
        steps=steps,
        batch=16,
        context=config.context,
        generator=generator,
        device=run.device,
    )
    train(
        model,
        optimizer,
        batches,
        clip_norm=clip_norm,
        rate=warmup_cosine(steps, 40 * arm.steps),
        before_backward=previous_gradient_pass(model, optimizer, clip_norm),
    )
    windows = token_windows(text.test, context=config.context, limit=run.windows, device=run.device)
    return evaluate(model, windows)[0]


def language_losses(
    run: Run, arms: Sequence[Arm], seeds: Sequence[int], length: LanguageRun
) -> dict[str, list[float]]:
    """Held-out loss of each arm, one per seed."""
    text = data.stdlib_source()
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    losses: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for arm, seed in run.track(jobs, "runs"):
        losses[arm.name].append(train_language_model(arm, seed, text, length))
    return losses
