"""Claim 8: networks on digits with Adam, at every width and rate, under muP and under standard practice."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from sizes import Transfer
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
from tenfold_tools.claims import Run
from tenfold_tools.data import digits
from tenfold_tools.workloads import DigitsMLP

BASE = 64
BATCH = 128


def model_of(scheme: str, width: int, seed: int) -> tuple[nn.Module, dict[str, Role] | None]:
    """A network with three hidden layers; under muP equal to the standard one at width 64."""

    def plain(size: int) -> DigitsMLP:
        return DigitsMLP(torch.Generator().manual_seed(seed), (64, size, size, size, 10))

    model = plain(width)
    if scheme != "mup":
        return model, None
    roles = infer_roles(model, base=plain(BASE))
    apply_mup(model, roles)
    return model, roles


def optimizer_of(
    model: nn.Module, roles: dict[str, Role] | None = None, *, lr: float
) -> torch.optim.Optimizer:
    """Adam, its rates by muP where there are roles."""
    return torch.optim.Adam(model.parameters() if roles is None else param_groups(model, roles, lr=lr), lr=lr)


def batch_of(device: str, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch for the same seed and step."""
    samples = digits()
    rows = np.random.default_rng([seed, step]).integers(0, len(samples.inputs), BATCH)
    X = torch.as_tensor(np.asarray(samples.inputs)[rows], dtype=torch.float32, device=device)
    return X, torch.as_tensor(np.asarray(samples.targets)[rows], device=device)


def sweep(run: Run, size: Transfer, scheme: str) -> TransferReport:
    """Final training loss at every width, rate and seed."""
    everything = digits()
    X = torch.as_tensor(np.asarray(everything.inputs), dtype=torch.float32, device=run.device)
    y = torch.as_tensor(np.asarray(everything.targets), device=run.device)

    def loss_after_training(width: int, lr: float, seed: int) -> float:
        model, roles = model_of(scheme, width, seed)
        model.to(run.device)
        optimizer = optimizer_of(model, roles, lr=lr)
        for step in range(size.steps):
            inputs, targets = batch_of(run.device, seed, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(model(X), y))
        return loss if math.isfinite(loss) else math.inf

    return lr_sweep(loss_after_training, size.widths, size.lrs, run.seeds)


def coordinates(run: Run, size: Transfer, scheme: str) -> CoordReport:
    """Coordinate check of the networks of the sweep."""
    return coordinate_check(
        lambda width: _seeded(scheme, width, run.device),
        partial(batch_of, run.device),
        size.widths,
        run.seeds,
        optimizer_fn=partial(optimizer_of, lr=2.0**-8),
    )


def _seeded(scheme: str, width: int, device: str):
    seed = int(torch.randint(2**31, ()))  # coordinate_check seeds the global generator before
    model, roles = model_of(scheme, width, seed)
    model.to(device)
    return model if roles is None else (model, roles)
