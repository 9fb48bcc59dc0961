"""The figures of the claims, on the report's canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mup_features.coordinates import CoordReport
from mup_features.jax.trajectory import Trajectory
from mup_features.plots import measure_versus_width
from mup_features.transfer import TransferReport
from tenfold_tools.claims import Figure

NAMES = {"mup": "muP", "ntp": "NTP", "sp": "SP", "ip": "IP"}


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


def over_steps(title: str, curves: Mapping[str, np.ndarray]) -> Figure:
    """Positive quantities over steps, on a logarithmic axis."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for name, values in curves.items():
            axes.plot(values, label=name)
        axes.set(yscale="log", xlabel="step")
        axes.legend()

    return Figure(title, draw)


def losses(title: str, curves: Mapping[str, np.ndarray]) -> Figure:
    """Loss over steps, [steps, seeds], with the range of the seeds."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, values) in enumerate(curves.items()):
            steps = np.arange(len(values))
            axes.fill_between(steps, values.min(1), values.max(1), color=f"C{number}", alpha=0.2)
            axes.plot(steps, values.mean(1), color=f"C{number}", label=name)
        axes.set(yscale="log", xlabel="step", ylabel="loss")
        axes.legend()

    return Figure(title, draw)


def rates(title: str, widths: Sequence[int], curves: Mapping[str, np.ndarray], exponent: float) -> Figure:
    """Root mean squares over networks, [widths, networks], against width, with the expected slope."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, (name, rows) in enumerate(curves.items()):
            values = np.sqrt((rows**2).mean(axis=1))
            axes.plot(widths, values, "o-", color=f"C{number}", label=NAMES.get(name, name))
            line = values[0] * (np.asarray(widths) / widths[0]) ** exponent
            axes.plot(widths, line, ":", color=f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="RMSE")
        axes.legend()

    return Figure(title, draw)


def outputs_over_steps(title: str, networks: Mapping[str, np.ndarray], limit: Trajectory) -> Figure:
    """First output of each sample over steps: networks with their range, the limit with its error bars."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for name, f in networks.items():
            for sample in range(f.shape[2]):
                values = f[:, :, sample, 0]
                label = f"{name}, all networks" if sample == 0 else None
                axes.fill_between(
                    limit.steps, values.min(0), values.max(0), color=f"C{sample}", alpha=0.2, label=label
                )
        for sample in range(limit.f.shape[1]):
            label = "limit" if sample == 0 else None
            errors = limit.stderr("f")[:, sample, 0]
            axes.errorbar(
                limit.steps, limit.f[:, sample, 0], errors, fmt="o-", color=f"C{sample}", label=label
            )
        axes.set(xlabel="step", ylabel="output")
        axes.legend()

    return Figure(title, draw)


def sweep(title: str, report: TransferReport) -> Figure:
    """Loss over learning rate, one curve per width with the range of the seeds."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, width in enumerate(report.widths):
            values = np.where(np.isfinite(report.losses[number]), report.losses[number], np.nan)
            axes.fill_between(report.lrs, values.min(1), values.max(1), color=f"C{number}", alpha=0.2)
            axes.plot(report.lrs, values.mean(1), "o-", color=f"C{number}", label=f"width {width}")
        axes.set(xscale="log", yscale="log", xlabel="learning rate at base width", ylabel="loss")
        axes.legend()

    return Figure(title, draw)


def coordinates(title: str, report: CoordReport) -> Figure:
    """Changes since initialization over width at the last step, one curve per module."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for number, name in enumerate(report.modules):
            values = report.changes[:, :, -1, number]
            axes.fill_between(report.widths, values.min(1), values.max(1), color=f"C{number}", alpha=0.2)
            axes.plot(report.widths, values.mean(1), "o-", color=f"C{number}", label=name)
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel=f"change after {report.steps} steps")
        axes.legend(fontsize="x-small")

    return Figure(title, draw)
