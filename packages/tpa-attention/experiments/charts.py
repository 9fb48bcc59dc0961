"""The figures of the claims, as functions that draw on an empty matplotlib canvas."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from tenfold_tools.claims import Figure, Number

ROUNDING_FLOOR = 1e-18  # where an error of exactly zero is drawn on a logarithmic axis


def sorted_errors(
    title: str, errors: Mapping[str, Sequence[float]], thresholds: Mapping[str, float]
) -> Figure:
    """The distribution of errors: each series sorted, on a logarithmic axis, with the allowed errors."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, values) in enumerate(errors.items()):
            ordered = np.maximum(np.sort(values), ROUNDING_FLOOR)
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.plot(ordered, share, drawstyle="steps-post", color=f"C{number}", label=name)
        for name, threshold in thresholds.items():
            axes.axvline(threshold, linestyle=":", color=matplotlib.rcParams["text.color"])
            axes.text(threshold, 0.02, f" {name}", rotation=90, ha="right", va="bottom")
        axes.set(xlabel="largest absolute error", ylabel="share of the calls", xscale="log", ylim=(0, 1.02))
        axes.legend(loc="upper left")

    return Figure(title, draw)


def bars(title: str, axis: str, values: Mapping[str, float], threshold: float) -> Figure:
    """One error per row on a logarithmic axis, and the allowed one."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.barh(list(values), [max(value, ROUNDING_FLOOR) for value in values.values()], left=0)
        axes.axvline(threshold, color="C1", label="threshold")
        axes.set(xlabel=axis, xscale="log", xlim=(ROUNDING_FLOOR, threshold * 10))
        axes.invert_yaxis()
        axes.legend()

    return Figure(title, draw)


def curves(
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    logarithmic: bool = False,
) -> Figure:
    """One line per name through its (xs, ys); both axes logarithmic if asked."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, (xs, ys)) in enumerate(lines.items()):
            style = {"marker": "o", "markersize": 4} if logarithmic else {}
            axes.plot(xs, ys, color=f"C{number % 6}", label=name, **style)
        axes.set(xlabel=x, ylabel=y)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.legend()

    return Figure(title, draw)


def intervals(title: str, rows: Mapping[str, Number], axis: str, reference: float | None = None) -> Figure:
    """Each number as a point with its interval, one labelled row per number; a line where nothing differs."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for row, number in enumerate(rows.values()):
            if number.bounded:
                axes.plot([number.low, number.high], [row, row], color="C0")
            axes.plot(number.value, row, "o", color="C0")
        if reference is not None:
            axes.axvline(reference, linestyle=":", color=matplotlib.rcParams["text.color"])
        axes.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))

    return Figure(title, draw)


def grouped_bars(title: str, axis: str, groups: Mapping[str, Mapping[str, float]]) -> Figure:
    """One group of bars per key, one bar per inner name, log y."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        names = list(next(iter(groups.values())))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
            heights = [values[name] for values in groups.values()]
            axes.bar(at, heights, width, color=f"C{number % 6}", label=name, alpha=1 - 0.5 * (number // 6))
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set(ylabel=axis, yscale="log")
        axes.legend(fontsize="small", ncols=2)

    return Figure(title, draw)
