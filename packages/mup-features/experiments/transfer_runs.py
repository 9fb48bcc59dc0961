"""Claim 8: Adam at every width and rate, under muP and standard practice, and their coordinate checks."""

from __future__ import annotations

import math
from functools import partial

import torch
from networks import side_by_side
from sizes import Transfer
from tasks import TASKS, Task
from torch import nn

from mup_features import (
    CoordReport,
    Role,
    TransferReport,
    apply_mup,
    coordinate_check,
    infer_roles,
    lr_sweep,
    param_groups,
)
from tenfold_tools.claims import Number, Run

RATE_OF_CHECK = 2.0**-8


def model_of(task: Task, scheme: str, width: int, seed: int) -> tuple[nn.Module, dict[str, Role] | None]:
    """A model on the CPU; under muP equal to the standard one at base width."""
    model = task.model(width, seed, scheme == "mup")
    if scheme != "mup":
        return model, None
    base, other = (task.model(size, seed, True) for size in (task.base, task.base // 2))
    roles = infer_roles(model, base=base, other=other)
    apply_mup(model, roles, init="fan_in")
    return model, roles


def optimizer_of(
    model: nn.Module, roles: dict[str, Role] | None = None, *, lr: float
) -> torch.optim.Optimizer:
    """Adam, its rates by muP where there are roles."""
    groups = model.parameters() if roles is None else param_groups(model, roles, lr=lr)
    return torch.optim.Adam(groups, lr=lr, fused=True)  # a third of a step of the widest network otherwise


def sweep(run: Run, size: Transfer, scheme: str) -> TransferReport:
    """Loss after training at every width, rate and seed."""
    task = TASKS[size.task]
    everything = task.evaluation(run.device)

    def loss_after_training(job: tuple[int, float, int]) -> float:
        width, lr, seed = job
        model, roles = model_of(task, scheme, width, seed)
        model.to(run.device)
        optimizer = optimizer_of(model, roles, lr=lr)
        for step in range(size.steps):
            optimizer.zero_grad()
            _loss(model, task.draw(run.device, task.batch, seed, step)).backward()
            optimizer.step()
        with torch.no_grad():
            loss = _loss(model, everything).item()
        return loss if math.isfinite(loss) else math.inf

    # the widest first: what a last core is left with is short
    jobs = [(width, lr, seed) for width in reversed(size.widths) for lr in size.lrs for seed in run.seeds]
    made = side_by_side(loss_after_training, jobs, run.device)
    losses = dict(zip(run.track(jobs, scheme), made, strict=True))
    return lr_sweep(lambda width, lr, seed: losses[width, lr, seed], size.widths, size.lrs, run.seeds)


def coordinates(run: Run, size: Transfer, scheme: str) -> CoordReport:
    """Coordinate check of the models of the sweep."""
    task = TASKS[size.task]

    def seeded(width: int) -> nn.Module | tuple[nn.Module, dict[str, Role]]:
        seed = int(torch.randint(2**31, ()))  # coordinate_check seeds the global generator before
        model, roles = model_of(task, scheme, width, seed)
        model.to(run.device)
        return model if roles is None else (model, roles)

    return coordinate_check(
        seeded,
        partial(task.draw, run.device, task.probe),
        size.widths,
        run.seeds,
        optimizer_fn=partial(optimizer_of, lr=RATE_OF_CHECK),
    )


def shift(scheme: str, report: TransferReport) -> Number:
    """How far the best rate moves from the smallest width to the largest, whatever the direction."""
    found = report.shift()
    ends = sorted((abs(found.low), abs(found.high)))
    low = 0.0 if found.low <= 0.0 <= found.high else ends[0]
    return Number(f"shift of the best rate in octaves, {scheme}", abs(found.value), low, ends[1])


def steepest(scheme: str, report: CoordReport) -> Number:
    """The slope furthest from zero among those that a coordinate check judges."""
    slope = max((judgement.slope for judgement in report.verdict().judged), key=lambda one: abs(one.value))
    return Number(f"steepest slope of changes over width, {scheme}", *slope)


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
