"""A claim's figure as SVG text, once for a light page and once for a dark one.

The same figure gives the same bytes on every run (fixed ids, no date), so that a report changes only where a
number did. Text becomes outlines: the picture looks the same on a machine without the font.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure as Canvas
from matplotlib.rcsetup import cycler

from tenfold_tools.claims import Figure

_SHARED = {
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.figsize": (5.0, 3.1),  # inches; at phone width the 10 pt text is still readable
    "font.size": 10,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.transparent": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "tenfold",
}


def _style(ink: str, muted: str, grid: str, colours: list[str]) -> dict[str, Any]:
    return {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.edgecolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": grid,
        "axes.prop_cycle": cycler(color=colours),
        **_SHARED,
    }


# Hues that differ in lightness too, so that the order survives colour blindness and a grey print.
_LIGHT = _style(
    "#1d2430", "#6b7280", "#e3e6eb", ["#1d5fc4", "#c2410c", "#0b7a6c", "#a0219e", "#946300", "#475569"]
)
_DARK = _style(
    "#e8eaee", "#8d95a3", "#323945", ["#7db3ff", "#ff9b6a", "#4fd0bd", "#ee8fee", "#e6c162", "#aab4c5"]
)


def render(figure: Figure) -> dict[str, str]:
    """The figure's title and its SVG text in both styles, with a transparent background.

    Args:
        figure: its `draw` is called twice, each time on a fresh canvas.

    Returns:
        A dictionary with the keys "title", "light" and "dark".
    """
    return {"title": figure.title, "light": _svg(figure, _LIGHT), "dark": _svg(figure, _DARK)}


def _svg(figure: Figure, style: dict[str, Any]) -> str:
    # "default" first: a matplotlibrc of the user must not change the report.
    with matplotlib.style.context(["default", style]):
        canvas = Canvas()
        figure.draw(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
