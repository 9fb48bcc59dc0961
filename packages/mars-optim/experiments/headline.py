"""R7's design: every arm tuned on one grid of learning rates, chosen and reported on different seeds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from charts import intervals
from training import Arm, LanguageRun, configuration, language_losses

from tenfold_tools.claims import Criterion, Measurement, Number, Run, Verdict, below

RATES = (2e-3, 4e-3, 6e-3, 9e-3, 1.4e-2, 2e-2, 3e-2)
SELECTION_SEEDS = (0, 1, 2, 3, 4)


def headline_arms(rate: float) -> list[Arm]:
    """AdamW, AdamW with twice the steps, and MARS uncorrected, approximate and exact: same everything."""
    adamw = Arm("AdamW", "AdamW", rate, rate, (0.9, 0.95), weight_decay=0.01)
    mars = replace(adamw, optimizer="MARS")
    return [
        adamw,
        replace(adamw, name="AdamW, twice the steps", steps=2),
        replace(mars, name="MARS gamma 0", gamma=0.0),
        replace(mars, name="MARS approx"),
        replace(mars, name="MARS exact", is_approx=False),
    ]


def tune(run: Run, length: LanguageRun) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Index of each arm's best rate by its mean over the selection seeds, and every configuration tried."""
    chosen, tried = {}, []
    for candidates in zip(*map(headline_arms, RATES), strict=True):  # one arm at every rate
        named = [replace(arm, name=f"{arm.name} at {arm.lr:g}") for arm in candidates]
        losses = language_losses(run, named, SELECTION_SEEDS, length)
        chosen[candidates[0].name] = int(np.argmin([np.mean(losses[arm.name]) for arm in named]))
        tried += records(named, SELECTION_SEEDS, losses, "selection")
    return chosen, tried


def records(
    arms: Sequence[Arm], seeds: Sequence[int], losses: dict[str, list[float]], purpose: str
) -> list[dict[str, Any]]:
    """One configuration per run, with what came out of it."""
    return [
        configuration(arm, seed, purpose=purpose, loss=losses[arm.name][i])
        for arm in arms
        for i, seed in enumerate(seeds)
    ]


def compare(
    arms: Sequence[Arm],
    losses: dict[str, list[float]],
    seeds: Sequence[int],
    chosen: dict[str, int],
    tried: Sequence[dict[str, Any]],
) -> Measurement:
    """The arms against AdamW on the reporting seeds; a best rate at the grid's edge decides nothing."""
    levels = [Number.mean(f"held-out loss, {arm.name}", losses[arm.name], "nats/byte") for arm in arms]
    gpt2 = {
        "MARS approx": "2.849 - 2.885 = -0.036 (GPT-2 small, 50B tokens)",
        "MARS exact": "2.847 - 2.885 = -0.038 (GPT-2 small, 50B tokens)",
    }
    gaps = {
        arm.name: Number.mean(
            f"{arm.name} minus AdamW",
            np.subtract(losses[arm.name], losses["AdamW"]),
            "nats/byte",
            published=gpt2.get(arm.name),
        )
        for arm in arms[1:]
    }
    equal_gradients = Number.mean(
        "MARS exact minus AdamW with twice the steps",
        np.subtract(losses["MARS exact"], losses["AdamW, twice the steps"]),
        "nats/byte",
    )
    return Measurement(
        numbers=[*gaps.values(), equal_gradients, *levels],
        criteria=[
            below(gaps["MARS approx"], 0.0),
            below(gaps["MARS exact"], 0.0),
            *[_interior(name, best) for name, best in chosen.items()],
        ],
        configurations=[*tried, *records(arms, seeds, losses, "report")],
        figures=[
            intervals(
                "Held-out loss of the byte-level GPT, 400 steps",
                {arm.name: level for arm, level in zip(arms, levels, strict=True)},
                "nats per byte",
            )
        ],
        note="Same betas, decay, clipping and grid for every arm. The exact form uses two gradients per "
        "step: the fair opponent at equal gradients is AdamW with twice the steps.",
    )


def _interior(name: str, best: int) -> Criterion:
    inside = 0 < best < len(RATES) - 1
    text = f"the best rate of {name}, {RATES[best]:g}, is inside the grid"
    return Criterion(text, Verdict.PASS if inside else Verdict.INCONCLUSIVE)
