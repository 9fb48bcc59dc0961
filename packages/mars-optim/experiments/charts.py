"""The figures of the claims, as functions that draw on an empty matplotlib canvas."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from mars_optim import theory
from tenfold_tools.claims import Figure, Number


def lines(title: str, x: str, y: str, curves: dict[str, list[tuple[float, Number]]]) -> Figure:
    """Means with intervals against x, one line per name, log y."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, points) in enumerate(curves.items()):
            xs, values = [x for x, _ in points], [n.value for _, n in points]
            spread = [
                [n.value - max(n.low, n.value / 100) for _, n in points],
                [n.high - n.value for _, n in points],
            ]
            axes.errorbar(xs, values, yerr=spread, marker="o", capsize=3, color=f"C{number}", label=name)
        axes.axhline(1.0, linestyle=":", color=matplotlib.rcParams["text.color"])
        axes.set(xlabel=x, ylabel=y, yscale="log")
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


def draw_noise(canvas: Any, pairs: Sequence[tuple[float, float]], measured: Sequence[Number]) -> None:
    """The closed form over gamma, and what was measured at some (beta1, gamma)."""
    axes = canvas.subplots()
    gammas = np.linspace(0, 1, 101)
    for colour, beta1 in (("C0", 0.95), ("C1", 0.9)):
        axes.plot(
            gammas, [theory.noise_ratio(beta1, g) for g in gammas], color=colour, label=f"beta1 {beta1:g}"
        )
        points = [(g, n.value) for (b, g), n in zip(pairs, measured, strict=True) if b == beta1]
        axes.plot(*zip(*points, strict=True), "o", color=colour)
    axes.set(xlabel="gamma", ylabel="Var(approximate) / Var(average)", yscale="log")
    axes.legend()


def draw_one_step_errors(canvas: Any, curves: Sequence[tuple[int, float, Any, list[float]]]) -> None:
    """Curves of (t, gamma*, gammas, errors)."""
    axes = canvas.subplots()
    for number, (t, star, gammas, errors) in enumerate(curves):
        axes.plot(gammas, errors, color=f"C{number}", label=f"t = {t}")
        axes.plot(star, np.interp(star, gammas, errors), "o", color=f"C{number}")
    axes.set(xlabel="gamma", ylabel="E|eps|^2 / value at gamma = 0", yscale="log")
    axes.legend()
