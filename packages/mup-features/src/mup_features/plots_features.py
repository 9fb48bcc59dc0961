"""Figures of a FeatureReport: spectra, Grams before and after, measures along the layers (extra "plot")."""

import os
from typing import TYPE_CHECKING

import numpy as np

# Says what to install where matplotlib is missing.
from .plots import PALETTE, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .reports import FeatureReport

# Measures drawn along the layers: panel title -> label -> key.
_PANELS = {
    "change": {"relative": "change", "per coordinate": "absolute_change"},
    "lambda_min": {"before": "lambda_min_before", "after": "lambda_min_after", "joint": "joint_lambda_min"},
    "effective rank": {"before": "effective_rank_before", "after": "effective_rank_after"},
    "kernels": {"distance": "kernel_distance", "CKA": "cka", "unbiased CKA": "cka_unbiased"},
}
_COLORS: dict[str, str] = dict(zip(("before", "after", "joint"), PALETTE, strict=False))
# Grams of more layers than this would make a page of stamps; the first and last layers say most.
_MOST_LAYERS = 6


def save_report(report: "FeatureReport", path: str | os.PathLike[str]) -> None:
    """Writes the figure of a report, in the format of the path's ending.

    Raises:
        ValueError: if matplotlib does not know the ending.
    """
    save(report_figure(report), path)


def report_figure(report: "FeatureReport") -> "Figure":
    """One row of measures along the layers, then a row for each layer: spectra, Gram before, Gram after.

    Eigenvalues at or below zero are drawn at the rounding level of their Gram. Of more than six layers the
    first three and last three have a row.
    """
    from matplotlib.figure import Figure

    names = list(report.measures)
    half = _MOST_LAYERS // 2
    shown = names if len(names) <= _MOST_LAYERS else names[:half] + names[-half:]
    figure = Figure(figsize=(15, 3.2 + 3 * len(shown)), layout="tight")
    rows = figure.subplots(1 + len(shown), len(_PANELS), squeeze=False)
    figure.suptitle(f"Features, {report.before} to {report.after}")
    for axis, (title, curves) in zip(rows[0], _PANELS.items(), strict=True):
        _draw_along_layers(axis, report, title, curves)
    for row, layer in zip(rows[1:], shown, strict=True):
        _draw_spectra(row[0], layer, report.spectra[layer])
        _draw_grams(row[1:3], report.grams[layer])
        _draw_gram_change(row[3], report.grams[layer])
    return figure


def _draw_along_layers(axis: "Axes", report: "FeatureReport", title: str, curves: dict[str, str]) -> None:
    names = list(report.measures)
    for label, key in curves.items():
        values = np.array([report.measures[name].get(key, np.nan) for name in names])
        values[~np.isfinite(values)] = np.nan
        if title == "lambda_min":
            floors = [report.measures[name]["floor_after"] or np.finfo(float).tiny for name in names]
            values = np.maximum(values, floors)
        if not np.isnan(values).all():
            axis.plot(range(len(names)), values, "o-", label=label, color=_COLORS.get(label))
    if title == "lambda_min":
        axis.set_yscale("log")
    axis.set_title(title)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")
    if axis.lines:
        axis.legend(fontsize="x-small")


def _draw_spectra(axis: "Axes", layer: str, spectra: dict[str, np.ndarray]) -> None:
    for label, values in spectra.items():
        floor = len(values) * np.finfo(float).eps * np.abs(values).max() or np.finfo(float).tiny
        axis.semilogy(np.maximum(values[::-1], floor), ".-", label=label, color=_COLORS[label])
    axis.set_title(f"{layer}: eigenvalues, largest first")
    axis.legend(fontsize="x-small")


def _draw_grams(axes: np.ndarray, grams: dict[str, np.ndarray]) -> None:
    """Both on one colour scale: a layer that vanishes at initialisation must look like it."""
    top = max(float(np.abs(K).max()) for K in grams.values()) or 1.0
    for axis, (when, K) in zip(axes, grams.items(), strict=True):
        _draw_matrix(axis, K, top, f"Gram {when}")


def _draw_gram_change(axis: "Axes", grams: dict[str, np.ndarray]) -> None:
    change = grams["after"] - grams["before"]
    _draw_matrix(axis, change, float(np.abs(change).max()) or 1.0, "change of the Gram")


def _draw_matrix(axis: "Axes", K: np.ndarray, top: float, title: str) -> None:
    axis.imshow(K, cmap="RdBu_r", vmin=-top, vmax=top)
    axis.set_title(f"{title} (colours to {top:.2g})")
    axis.set_axis_off()
