"""What C6 reports of its runs: the paired difference to MHA that decides, and the others that do not.

PASS when the one-sided 95 % upper bound of mean(TPA - MHA) is below 0.05 nats, FAIL when the lower bound is
above it. Superiority is reported with its two-sided interval and never decided: at this scale the noise of a
single run, 0.03 to 0.08 nats, is as large as the effect. The whole design has variants of TPA as well, among
them the initial values of the released code; what they lose to MHA is reported beside.
"""

from collections.abc import Sequence
from typing import Any

import language
from charts import curves, intervals
from language import Arm, Length, Runs

from tenfold_tools.claims import Figure, Measurement, Number, below, within
from tenfold_tools.stats import t_interval
from tpa_attention import accounting

MARGIN = 0.05  # nats per byte


def compare_with_mha(
    arms: Sequence[Arm], seeds: Sequence[int], found: Runs, length: Length, tried: list[dict[str, Any]]
) -> Measurement:
    """The measurement of C6.

    Args:
        arms: mechanisms, MHA and TPA (4,1,1) among them.
        seeds: the judging seeds.
        found: their runs.
        length: of the runs.
        tried: configurations of the tuning.
    """
    mha, tpa = (next(arm for arm in arms if arm.name == known.name) for known in (language.MHA, language.TPA))
    judged = one_sided(f"{tpa.name} minus {mha.name}", language.differences(tpa, mha, seeds, found))
    rivals = [arm for arm in arms if arm.mechanism in ("mha", "mqa", "gqa")]
    gaps = {arm.name: language.gap(tpa, arm, seeds, found) for arm in rivals}
    variants = [arm for arm in arms if arm not in rivals and arm is not tpa]
    others = [language.gap(arm, mha, seeds, found) for arm in variants]
    levels = language.levels(arms, seeds, found)
    cached = {arm.name: accounting.cache_numbers(arm.config) for arm in arms}
    saved = Number("cached numbers, MHA over TPA", cached[mha.name] / cached[tpa.name])
    verdicts = "; ".join(f"{name}: {language.superiority(gap)}" for name, gap in gaps.items())
    return Measurement(
        numbers=[judged, saved, *gaps.values(), *others, *levels.values()],
        criteria=[below(judged, MARGIN), within(saved, 3.2, 3.2)],
        configurations=[*tried, *language.configurations(arms, seeds, found, length, "judging")],
        figures=[
            *training_figures(arms, seeds, found, f"{length.steps} steps"),
            intervals("Held-out loss of the byte-level T6", levels, "nats per byte"),
        ],
        note="Lower loss than the baselines, by the two-sided interval (reported, never decided here): "
        f"{verdicts}. T6 medium on FineWeb-Edu: experiments/train_lm.py.",
    )


def one_sided(name: str, samples: list[float]) -> Number:
    """A mean whose limits are one-sided 95 % bounds: the two-sided interval at 90 %."""
    mean = sum(samples) / len(samples)
    low, high = t_interval(samples, level=0.9)
    return Number(f"{name} (one-sided 95 % bounds)", mean, min(low, mean), max(high, mean), "nats/byte")


def training_figures(arms: Sequence[Arm], seeds: Sequence[int], found: Runs, title: str) -> list[Figure]:
    """The training curves of all arms."""
    smooth = language.smoothed_curves(arms, seeds, found)
    lines = {name: (range(len(values)), values) for name, values in smooth.items()}
    return [curves(f"Training loss, mean over seeds, {title}", "step", "nats per byte", lines)]
