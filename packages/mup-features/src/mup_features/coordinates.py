r"""Coordinate check: do activations and their changes keep their size when the model grows?

Under muP every hidden activation, and after a few steps the output, moves by an amount that does not depend
on width. Take the sizes s(n) of these changes at several widths n and fit log s = p log n + const, once for
every seed: p has to be 0 within a tolerance. Under the standard parametrization with one rate for all, p is
about 1/2 to 1 (too large a step) or, at a rate divided by width, -1/2 (features freeze).

Changes are judged, sizes are only reported: the output of a muP model is small at initialization
(p = -1/2, from its small readout) and catches up in the first steps.

Source: Yang et al. 2022 (arXiv 2203.03466), appendix D.1 (the plots); the numeric verdict is ours.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from . import _files
from ._intervals import Estimate, Outcome, check_level, mean_interval, slopes_of_log

Record = Literal["rms", "l1"]
Quantity = Literal["size", "change"]

THRESHOLD = 0.15
FIRST_JUDGED_STEP = 2


@dataclass(frozen=True)
class Judgement:
    """The slope of one module at one step.

    Attributes:
        module: its name.
        step: updates made before.
        slope: of log change against log width, with its interval over seeds.
        outcome: whether the slope is flat.
    """

    module: str
    step: int
    slope: Estimate
    outcome: Outcome


@dataclass(frozen=True)
class CoordVerdict:
    """What a coordinate check found.

    Attributes:
        outcome: FAIL if a judged slope is not flat, else INCONCLUSIVE if one may not be, else PASS.
        reasons: in words; also what was left out of the judgement and why.
        judged: every slope that counted.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    judged: tuple[Judgement, ...]

    @property
    def passed(self) -> bool:
        """Whether the outcome is PASS."""
        return self.outcome == "PASS"

    def __str__(self) -> str:
        return "\n".join([self.outcome, *(f"- {reason}" for reason in self.reasons)])


@dataclass(frozen=True, eq=False)
class CoordReport:
    """Sizes of activations and of their changes since initialization, at several widths.

    Attributes:
        widths: increasing.
        seeds: one run per width and seed.
        modules: names of what was recorded.
        outputs: those of them that are the model's output.
        sizes: size of each activation after 0, 1, .. updates.
        changes: size of its difference from the one at step 0, on the same inputs.
        record: what "size" means: "rms", the root mean square over all entries, or "l1", the mean absolute
            value.
    """

    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    modules: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Float[np.ndarray, "widths seeds steps modules"]
    changes: Float[np.ndarray, "widths seeds steps modules"]
    record: Record = "rms"

    def __post_init__(self) -> None:
        for name in ("widths", "seeds", "modules", "outputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_grid(self.widths, self.seeds, self.record)
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(f"modules must be distinct names, at least one, got {self.modules!r}")
        if unknown := sorted(set(self.outputs) - set(self.modules)):
            raise ValueError(f"outputs must be among modules, got {unknown}")
        for name in ("sizes", "changes"):
            values = np.array(getattr(self, name), np.float64)
            wanted = (len(self.widths), len(self.seeds), None, len(self.modules))
            if values.ndim != 4 or any(n not in (None, m) for n, m in zip(wanted, values.shape, strict=True)):
                raise ValueError(f"{name} must have shape {wanted}, got {values.shape}")
            if (values < 0.0).any():
                raise ValueError(f"{name} must be >= 0, got {values.min()!r}")
            object.__setattr__(self, name, values)
        if self.sizes.shape != self.changes.shape:
            raise ValueError(
                f"changes must have the shape of sizes, {self.sizes.shape}, got {self.changes.shape}"
            )

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.sizes.shape[2] - 1

    def slope(self, module: str, step: int, quantity: Quantity = "change", level: float = 0.95) -> Estimate:
        """Slope of log size (or change) against log width, with Student's interval over seeds.

        Args:
            module: one of `modules`.
            step: updates made before, 0 to `steps`.
            quantity: "change" or "size".
            level: coverage of the interval.

        Returns:
            The mean of the seeds' slopes; nan and an infinite interval where a size is zero or not finite.

        Raises:
            ValueError: for an unknown module or quantity, or a step that was not recorded.
        """
        if module not in self.modules:
            raise ValueError(f"module must be one of {', '.join(self.modules)}, got {module!r}")
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be in [0, {self.steps}], got {step!r}")
        if quantity not in get_args(Quantity):
            raise ValueError(f"quantity must be 'size' or 'change', got {quantity!r}")
        values = self.changes if quantity == "change" else self.sizes
        at = values[:, :, step, self.modules.index(module)]
        return mean_interval(slopes_of_log(np.array(self.widths), at), level)

    def verdict(
        self, threshold: float = THRESHOLD, *, from_step: int = FIRST_JUDGED_STEP, level: float = 0.95
    ) -> CoordVerdict:
        """Whether every change is flat in width: |slope| < threshold at every step from `from_step` on.

        A slope is judged by its interval over seeds, which is infinite for fewer than three seeds. Modules
        that never move (constants, frozen parts) are left out.

        Args:
            threshold: how far from zero a slope may be, > 0.
            from_step: first step that counts, >= 1. Before step 2 a readout that starts small or at zero
                holds back the layers below it, and the output shrinks with width.
            level: coverage of the intervals.

        Raises:
            ValueError: for a threshold <= 0, from_step < 1, or a level outside (0, 1).
        """
        check_level(level)
        if not threshold > 0.0:
            raise ValueError(f"threshold must be > 0, got {threshold!r}")
        if from_step < 1:
            raise ValueError(f"from_step must be >= 1, got {from_step!r}")
        still = [name for k, name in enumerate(self.modules) if not np.any(self.changes[..., k])]
        judged = [
            Judgement(module, step, slope, slope.within(-threshold, threshold))
            for module in self.modules
            if module not in still
            for step in range(from_step, self.steps + 1)
            for slope in [self.slope(module, step, level=level)]
        ]
        reasons = [
            *self._not_finite(),
            *_worst(judged, threshold),
            *self._early_output(threshold, from_step, level),
            *(f"{name}: does not move at any width, not judged" for name in still),
        ]
        if self.steps < from_step:
            reasons.append(
                f"nothing to judge: {self.steps} steps were recorded, the first that counts is {from_step}"
            )
        elif not judged:
            reasons.append("nothing to judge: nothing moved")
        elif len(self.seeds) < 3:
            reasons.append(f"{len(self.seeds)} seeds give no interval; use at least 3")
        return CoordVerdict(self._outcome(judged), tuple(reasons), tuple(judged))

    def _outcome(self, judged: Sequence[Judgement]) -> Outcome:
        found = {judgement.outcome for judgement in judged}
        if "FAIL" in found or self._not_finite():
            return "FAIL"
        return "PASS" if found == {"PASS"} else "INCONCLUSIVE"

    def _not_finite(self) -> list[str]:
        finite = np.isfinite(self.sizes) & np.isfinite(self.changes)
        broken = np.logical_not(np.all(finite, axis=(1, 3)))
        return [
            f"width {width}: not finite from step {int(np.argmax(row))} on"
            for width, row in zip(self.widths, broken, strict=True)
            if np.any(row)
        ]

    def _early_output(self, threshold: float, from_step: int, level: float) -> list[str]:
        found = []
        for name in self.outputs:
            early: list[tuple[Quantity, int]] = [("size", 0)]
            if self.steps >= 1 and from_step > 1:
                early.append(("change", 1))
            for quantity, step in early:
                slope = self.slope(name, step, quantity, level)
                if slope.value < -threshold:
                    found.append(
                        f"{name} (output): its {quantity} at step {step} shrinks with width, slope {slope}; "
                        "expected from a small readout at initialization, not judged"
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, arrays as nested lists."""
        return {
            "record": self.record,
            "widths": list(self.widths),
            "seeds": list(self.seeds),
            "modules": list(self.modules),
            "outputs": list(self.outputs),
            "sizes": self.sizes.tolist(),
            "changes": self.changes.tolist(),
        }

    def to_json(self) -> str:
        """The report as JSON text; nan and inf are strings."""
        return _files.to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "CoordReport":
        """The report that `to_json` wrote.

        Args:
            text: the JSON text.

        Raises:
            ValueError: if it is none or lacks an entry.
        """
        data = json.loads(text)
        names = ("widths", "seeds", "modules", "outputs", "sizes", "changes", "record")
        missing = [name for name in names if not isinstance(data, dict) or name not in data]
        if missing:
            raise ValueError(f"text must be a CoordReport, entries missing: {', '.join(missing)}")
        return cls(**{name: data[name] for name in names})

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per width, seed, step and module, in one step (atomic).

        Args:
            path: the file.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["width", "seed", "step", "module", "output", self.record, f"{self.record}_of_change"])
        for (w, s, t, k), size in np.ndenumerate(self.sizes):
            name = self.modules[k]
            place = [self.widths[w], self.seeds[s], t, name, int(name in self.outputs)]
            table.writerow([*place, repr(float(size)), repr(float(self.changes[w, s, t, k]))])
        _files.write_bytes(path, text.getvalue().encode())

    def to_markdown(self) -> str:
        """A table of slopes with their intervals, and the verdict."""
        last = self.steps
        title = f"| module | size, step 0 | size, step {last} | change, step {last} |"
        lines = [title, "|---|---|---|---|"]
        for name in self.modules:
            slopes = (self.slope(name, 0, "size"), self.slope(name, last, "size"), self.slope(name, last))
            mark = " (output)" if name in self.outputs else ""
            lines.append(f"| {name}{mark} | " + " | ".join(map(str, slopes)) + " |")
        what = f"Slopes of log {self.record} against log width, widths {', '.join(map(str, self.widths))}"
        return "\n".join([f"{what}, {len(self.seeds)} seeds.", "", *lines, "", str(self.verdict())])

    def __str__(self) -> str:
        return self.to_markdown()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save sizes and changes versus width, one curve per step and two panels per module.

        Args:
            path: the file; its suffix is the format (.png, .svg, .pdf).

        Raises:
            ImportError: without matplotlib.
        """
        from . import plots

        plots.save(plots.coordinate_figure(self), Path(path))


def check_grid(widths: Sequence[int], seeds: Sequence[int], record: str) -> None:
    """Refuse widths, seeds or a record that no coordinate check can use.

    Args:
        widths: at least two, increasing, >= 1.
        seeds: at least one, distinct.
        record: "rms" or "l1".

    Raises:
        ValueError: if one of them is not so.
    """
    if len(widths) < 2 or min(widths) < 1 or any(b <= a for a, b in itertools.pairwise(widths)):
        raise ValueError(f"widths must be increasing, >= 1 and at least two, got {tuple(widths)!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {tuple(seeds)!r}")
    if record not in get_args(Record):
        raise ValueError(f"record must be 'rms' or 'l1', got {record!r}")


def _worst(judged: Sequence[Judgement], threshold: float) -> list[str]:
    """The slope that is furthest from flat of every module that does not pass, or of all where all pass."""
    open_or_bad = [judgement for judgement in judged if judgement.outcome != "PASS"]
    if not open_or_bad:
        if not judged:
            return []
        far = max(judged, key=lambda judgement: abs(judgement.slope.value))
        return [f"every change is flat: steepest {far.module} at step {far.step}, slope {far.slope}"]
    worst: dict[str, Judgement] = {}
    for judgement in open_or_bad:
        if judgement.module not in worst or _badness(judgement) > _badness(worst[judgement.module]):
            worst[judgement.module] = judgement
    return [
        f"{name}: {_WORDS[found.outcome]} at step {found.step}, slope of change {found.slope}, "
        f"limit {threshold:g}"
        for name, found in worst.items()
    ]


_WORDS = {"FAIL": "changes with width", "INCONCLUSIVE": "undecided"}


def _badness(judgement: Judgement) -> tuple[bool, float]:
    return judgement.outcome == "FAIL", abs(np.nan_to_num(judgement.slope.value))
