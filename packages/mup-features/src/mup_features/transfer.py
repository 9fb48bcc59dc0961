"""Learning-rate sweep over widths: does the best rate of a small model suit a large one?

Train at every width, learning rate and seed, find the best rate of each width, and measure how far it moves
from the smallest width to the largest, in octaves (factors of two). Under muP it stays; under the standard
parametrization the best rate of Adam falls about as 1/width.

The optimum is the vertex of the parabola in log(rate) through the best grid point and its two neighbours.

Source: Yang et al. 2022 (arXiv 2203.03466), figure 1; the statistic and its interval are ours.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from . import _files
from ._intervals import MIN_SEEDS, Estimate, check_level

TrainFn = Callable[[int, float, int], float]
Run = tuple[int, float, int]


@dataclass(frozen=True)
class Optimum:
    """Best learning rate of one width.

    Attributes:
        width: the width.
        lr: the best rate; None where every rate diverged.
        loss: loss there, by the parabola.
        at_edge: whether the best grid point is the first or last, so that the true optimum may lie outside.
        beside_divergence: whether a neighbour diverged, so that the grid point itself stands for the vertex.
    """

    width: int
    lr: float | None
    loss: float
    at_edge: bool
    beside_divergence: bool


@dataclass(frozen=True, eq=False)
class TransferReport:
    """Losses of a sweep and where the optima lie.

    Attributes:
        widths: increasing.
        lrs: increasing.
        seeds: of the runs.
        losses: of every run; nan or inf where it diverged.
    """

    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: Float[np.ndarray, "widths lrs seeds"]

    def __post_init__(self) -> None:
        for name in ("widths", "lrs", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_grid(self.widths, self.lrs, self.seeds)
        losses = np.array(self.losses, np.float64)
        if losses.shape != (wanted := (len(self.widths), len(self.lrs), len(self.seeds))):
            raise ValueError(f"losses must have shape {wanted}, got {losses.shape}")
        object.__setattr__(self, "losses", losses)

    def optimum(self, width: int) -> Optimum:
        """Best rate of a width for the mean over seeds; a rate at which any seed diverged is none.

        Args:
            width: one of `widths`.

        Raises:
            ValueError: for any other width.
        """
        if width not in self.widths:
            raise ValueError(f"width must be one of {', '.join(map(str, self.widths))}, got {width!r}")
        mean = _mean_over_seeds(self.losses[self.widths.index(width)])
        return replace(_vertex(np.log2(self.lrs), mean), width=width)

    def shift(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
        """Octaves by which the optimum moves from the smallest width to the largest; negative if it falls.

        The interval is a percentile bootstrap over seeds, the same seeds at every width. With three seeds it
        is coarse (ten different resamples).

        Args:
            level: coverage of the interval.
            resamples: bootstrap resamples, >= 100.
            seed: of the resampling.

        Returns:
            The shift; nan where a width has no optimum, an infinite interval for fewer than 3 seeds.

        Raises:
            ValueError: for a level outside (0, 1) or resamples < 100.
        """
        check_level(level)
        if resamples < 100:
            raise ValueError(f"resamples must be >= 100, got {resamples!r}")
        value = self._shift_of(np.arange(len(self.seeds)))
        if len(self.seeds) < MIN_SEEDS or math.isnan(value):
            return Estimate(value, -math.inf, math.inf)
        draws = np.random.default_rng(seed).integers(0, len(self.seeds), (resamples, len(self.seeds)))
        # few seeds have few different resamples: each is computed once
        different, place = np.unique(np.sort(draws, axis=1), axis=0, return_inverse=True)
        shifts = np.array([self._shift_of(picks) for picks in different])[place.reshape(-1)]
        low, high = np.quantile(shifts, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(value, float(low), float(high))

    def _shift_of(self, picks: np.ndarray) -> float:
        first, last = (
            _vertex(np.log2(self.lrs), _mean_over_seeds(self.losses[w][:, picks])) for w in (0, -1)
        )
        return math.nan if first.lr is None or last.lr is None else math.log2(last.lr / first.lr)

    def warnings(self) -> list[str]:
        """What keeps an optimum from being trusted: edges of the grid, divergence beside it or everywhere."""
        found = []
        for best in map(self.optimum, self.widths):
            if best.lr is None:
                found.append(f"width {best.width}: every learning rate diverged")
            elif best.at_edge:
                found.append(
                    f"width {best.width}: optimum {best.lr:.3g} is at the edge of the grid, widen it"
                )
            elif best.beside_divergence:
                found.append(f"width {best.width}: optimum {best.lr:.3g} is beside a rate that diverged")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        return {
            "widths": list(self.widths),
            "lrs": list(self.lrs),
            "seeds": list(self.seeds),
            "losses": self.losses.tolist(),
        }

    def to_json(self) -> str:
        """The report as JSON text; nan and inf are strings."""
        return _files.to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "TransferReport":
        """The report that `to_json` wrote.

        Args:
            text: the JSON text.

        Raises:
            ValueError: if it is none or lacks an entry.
        """
        data = json.loads(text)
        names = ("widths", "lrs", "seeds", "losses")
        missing = [name for name in names if not isinstance(data, dict) or name not in data]
        if missing:
            raise ValueError(f"text must be a TransferReport, entries missing: {', '.join(missing)}")
        return cls(**{name: data[name] for name in names})

    def to_markdown(self) -> str:
        """A table of mean losses, the optimum of each width, the shift, and warnings."""
        lines = ["| width | " + " | ".join(f"{lr:.3g}" for lr in self.lrs) + " | best lr |"]
        lines.append("|---" * (len(self.lrs) + 2) + "|")
        for width, losses in zip(self.widths, self.losses, strict=True):
            best = self.optimum(width).lr
            cells = [f"{loss:.4g}" for loss in _mean_over_seeds(losses)]
            lines.append(
                f"| {width} | " + " | ".join(cells) + f" | {'none' if best is None else f'{best:.3g}'} |"
            )
        shift = f"Shift of the optimum, width {self.widths[0]} to {self.widths[-1]}: {self.shift()} octaves."
        return "\n".join([*lines, "", shift, *(f"- {warning}" for warning in self.warnings())])

    def __str__(self) -> str:
        return self.to_markdown()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save loss versus learning rate, one curve per width.

        Args:
            path: the file; its suffix is the format (.png, .svg, .pdf).

        Raises:
            ImportError: without matplotlib.
        """
        from .plots import save, sweep_figure

        save(sweep_figure(self), Path(path))


def lr_sweep(
    train_fn: TrainFn,
    widths: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int],
    workers: int = 1,
    resume: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> TransferReport:
    """Train at every width, learning rate and seed.

    Args:
        train_fn: called with (width, lr, seed), returns the final loss; nan and inf mean divergence. With
            several workers it must be importable by name (no lambda).
        widths: at least two, increasing.
        lrs: at least three, increasing; steps of a factor of two or less let a parabola fit.
        seeds: distinct.
        workers: processes that train at the same time.
        resume: a JSON file that keeps every finished run, rewritten in one step after each: a sweep that
            was interrupted goes on from there, and a wider grid reuses it. It knows runs by width, rate and
            seed alone: take another file for another `train_fn`.
        progress: whether to show a bar; only in a terminal.

    Raises:
        ValueError: for a bad grid, workers < 1, or a resume file that is none.
        TypeError: if `train_fn` returns no number.
    """
    _check_grid(widths, lrs, seeds)
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers!r}")
    wanted: list[Run] = [(int(w), float(lr), int(s)) for w in widths for lr in lrs for s in seeds]
    done = {} if resume is None else _read(Path(resume))
    missing = [run for run in wanted if run not in done]
    with tqdm(total=len(wanted), unit="run", disable=None if progress else True, leave=False) as bar:
        bar.update(len(wanted) - len(missing))
        for run, loss in _train(train_fn, missing, workers):
            done[run] = loss
            if resume is not None:
                _files.write_json(resume, {"runs": [[*key, value] for key, value in done.items()]})
            bar.update()
    losses = np.array([done[run] for run in wanted]).reshape(len(widths), len(lrs), len(seeds))
    return TransferReport(tuple(widths), tuple(map(float, lrs)), tuple(seeds), losses)


def _train(train_fn: TrainFn, runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, float]]:
    """Losses as they come; whoever stops listening, by an interrupt too, stops the work."""
    if workers == 1:
        for run in runs:
            yield run, _number(train_fn(*run), run)
        return
    # "spawn": a forked child inherits the locks of torch's and jax's threads and may hang
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        pending = {pool.submit(train_fn, *run): run for run in runs}
        for future in as_completed(pending):
            yield pending[future], _number(future.result(), pending[future])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _number(loss: Any, run: Run) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"train_fn must return a number, got {loss!r} for (width, lr, seed) = {run}"
        ) from None


def _read(path: Path) -> dict[Run, float]:
    if not path.exists():
        return {}
    try:
        return {
            (int(w), float(lr), int(s)): float(loss)
            for w, lr, s, loss in json.loads(path.read_text())["runs"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume must be a file of lr_sweep, got {str(path)!r} ({error!r})") from None


def _mean_over_seeds(losses: np.ndarray) -> np.ndarray:
    """Mean of each row; inf where a run diverged."""
    return np.where(np.isfinite(losses).all(1), np.where(np.isfinite(losses), losses, 0.0).mean(1), math.inf)


def _vertex(log_lr: np.ndarray, loss: np.ndarray) -> Optimum:
    """Vertex of the parabola through the best grid point and its neighbours; the grid may be uneven."""
    best = int(np.argmin(loss))
    if not math.isfinite(loss[best]):
        return Optimum(0, None, math.inf, at_edge=False, beside_divergence=True)
    at_edge = best in (0, len(loss) - 1)
    around = slice(max(best - 1, 0), best + 2)
    diverged = not np.isfinite(loss[around]).all()
    if at_edge or diverged:
        return Optimum(0, float(2.0 ** log_lr[best]), float(loss[best]), at_edge, diverged)
    left, right = log_lr[best - 1] - log_lr[best], log_lr[best + 1] - log_lr[best]
    down, up = (loss[best - 1] - loss[best]) / left, (loss[best + 1] - loss[best]) / right
    curvature = (up - down) / (right - left)
    if curvature <= 0.0:  # three equal losses: no vertex
        return Optimum(
            0, float(2.0 ** log_lr[best]), float(loss[best]), at_edge=False, beside_divergence=False
        )
    slope = down - curvature * left
    at = -slope / (2.0 * curvature)
    value = loss[best] + slope * at + curvature * at * at
    return Optimum(0, float(2.0 ** (log_lr[best] + at)), float(value), at_edge=False, beside_divergence=False)


def _check_grid(widths: Sequence[int], lrs: Sequence[float], seeds: Sequence[int]) -> None:
    for name, values, least in (("widths", widths, 2), ("lrs", lrs, 3)):
        increasing = all(b > a for a, b in zip(values, list(values)[1:], strict=False))
        if len(values) < least or not values[0] > 0 or not increasing or not math.isfinite(values[-1]):
            raise ValueError(
                f"{name} must be positive, increasing and at least {least}, got {tuple(values)!r}"
            )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {tuple(seeds)!r}")
