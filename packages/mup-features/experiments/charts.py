"""The figures of the claims, on the report's canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scheme_measures import Measures

from mup_features.coordinates import CoordReport
from mup_features.plots import measure_versus_width
from mup_features.transfer import TransferReport
from tenfold_tools.claims import Figure

NAMES = {"mup": "muP", "ntp": "NTP", "sp": "SP", "sp_const": "SP, one rate", "ip": "IP"}
LEGEND = 9  # more curves than these need no names: the numbers have them


def versus_width(
    title: str,
    measure: str,
    widths: Sequence[int],
    measured: Mapping[str, np.ndarray],
    limits: Mapping[str, float],
) -> Figure:
    """One curve per scheme with a band over seeds; dashed the value of muP at infinite width."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        curves = {NAMES[scheme]: values for scheme, values in measured.items()}
        found = {"muP": limits[measure]} if measure in limits else None
        measure_versus_width(axes, widths, curves, limits=found, ylabel=measure)

    return Figure(title, draw)


def over_steps(
    title: str,
    ylabel: str,
    steps: Sequence[int] | np.ndarray,
    curves: Mapping[str, np.ndarray],
    limit: np.ndarray | None = None,
) -> Figure:
    """A positive quantity over steps, [points, seeds], with the seeds' range; dashed the limit of muP."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, values) in enumerate(curves.items()):
            shown = np.where(values > 0.0, values, np.nan)
            axes.fill_between(steps, shown.min(1), shown.max(1), color=f"C{number}", alpha=0.2)
            axes.plot(steps, shown.mean(1), color=f"C{number}", label=name)
        if limit is not None:
            shown = np.where(limit > 0.0, limit, np.nan)
            axes.plot(steps, shown, "--", color=f"C{len(curves)}", label="muP, infinite width")
        axes.set(yscale="log", xlabel="step", ylabel=ylabel)
        axes.legend(fontsize="small")

    return Figure(title, draw)


def courses(measured: Measures, widths: tuple[int, ...]) -> list[Figure]:
    """Over steps: the kernel of the features under NTP and muP, loss and features of networks and limit."""
    ends = widths[0], widths[-1]
    limit = measured.limit_course

    def figure(title: str, quantity: str, schemes: tuple[str, ...]) -> Figure:
        curves = {
            f"{NAMES[scheme]}, width {width}": getattr(measured.courses[scheme, width], quantity)
            for scheme in schemes
            for width in ends
        }
        found = None if limit is None else getattr(limit, quantity)
        return over_steps(title, quantity.replace("_", " "), measured.steps, curves, found)

    return [
        figure(
            "Change of the kernel of the last features, |K - K_0| / |K_0|", "kernel_change", ("ntp", "mup")
        ),
        figure("Training loss under muP", "loss", ("mup",)),
        figure("Change of the last hidden features under muP", "change", ("mup",)),
    ]


def rates(title: str, widths: Sequence[int], curves: Mapping[str, np.ndarray], exponent: float) -> Figure:
    """Root mean squares over networks, [widths, networks], against width, with the expected slope."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, rows) in enumerate(curves.items()):
            values = np.sqrt((rows**2).mean(axis=1))
            axes.plot(widths, values, "o-", color=f"C{number}", label=NAMES[name])
            line = values[0] * (np.asarray(widths) / widths[0]) ** exponent
            axes.plot(widths, line, ":", color=f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="RMSE")
        axes.legend()

    return Figure(title, draw)


def with_limit(
    title: str,
    ylabel: str,
    names: Sequence[str],
    networks: np.ndarray,
    limit: np.ndarray,
    errors: np.ndarray,
) -> Figure:
    """Quantities over steps: networks [R, T, names] with mean and range, the limit [T, names] with errors."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        steps = np.arange(len(limit))
        for number, name in enumerate(names):
            values, colour = networks[:, :, number], f"C{number}"
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2)
            axes.plot(steps, values.mean(0), color=colour, label=f"{name}, networks")
            axes.errorbar(
                steps, limit[:, number], errors[:, number], fmt="o", color=colour, label=f"{name}, limit"
            )
        axes.set(xlabel="step", ylabel=ylabel)
        axes.legend(fontsize="small")

    return Figure(title, draw)


def sweep(title: str, report: TransferReport) -> Figure:
    """Loss over learning rate, one curve per width with the range of the seeds and its optimum dotted."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, width in enumerate(report.widths):
            values = np.where(np.isfinite(report.losses[number]), report.losses[number], np.nan)
            axes.fill_between(report.lrs, values.min(1), values.max(1), color=f"C{number}", alpha=0.2)
            axes.plot(report.lrs, values.mean(1), "o-", color=f"C{number}", label=f"width {width}")
            best = report.optimum(width).lr
            if best is not None:
                axes.axvline(best, linestyle=":", color=f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="learning rate at base width", ylabel="loss")
        axes.legend(fontsize="small")

    return Figure(title, draw)


def coordinates(title: str, report: CoordReport) -> Figure:
    """Sizes, and changes since initialization, over width: a curve per module and step, later ones bold."""

    def draw(canvas: Any) -> None:
        panels = canvas.subplots(1, 2)
        for axes, values, first, what in zip(
            panels, (report.sizes, report.changes), (0, 1), ("size", "change"), strict=True
        ):
            for number, name in enumerate(report.modules):
                for step in range(first, report.steps + 1):
                    axes.plot(
                        report.widths,
                        values[:, :, step, number].mean(1),
                        color=f"C{number % 6}",
                        alpha=0.2 + 0.8 * step / report.steps,
                        linewidth=1.0,
                        label=name if step == report.steps else None,
                    )
            axes.set(xscale="log", yscale="log", xlabel="width", title=f"{report.record} of {what}")
        if len(report.modules) <= LEGEND:
            panels[0].legend(fontsize="x-small")

    return Figure(title, draw)
