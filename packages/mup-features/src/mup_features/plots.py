"""Pictures of checks and measures over width (extra "plot").

    coordinate_figure       sizes and changes versus width, one curve per step, a pair of panels per module
    sweep_figure            loss versus learning rate, one curve per width, optima marked
    measure_versus_width    any measure versus width, one curve per scheme, limits dashed, on given axes

Curves take the colours of the current style in turn, with bands over seeds. Nothing is black, so that a dark
style works, and pyplot's global state is never touched. `save` uses the colours of the tenfold reports.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from . import _files

try:
    import matplotlib.style
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler
except ImportError as error:
    raise ImportError('mup_features.plots needs matplotlib: pip install "mup-features[plot]"') from error

if TYPE_CHECKING:
    from .coordinates import CoordReport
    from .transfer import TransferReport

PALETTE = ("#1d5fc4", "#c2410c", "#0b7a6c", "#a0219e", "#946300", "#475569")
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#6b7280",
    "axes.grid": True,
    "axes.labelcolor": "#1d2430",
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.color": "#e3e6eb",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "mup-features",
    "text.color": "#1d2430",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
}
_MARKERS = "osD^vP*X"
_COLUMNS = 6


def coordinate_figure(report: "CoordReport") -> Figure:
    """Sizes and, below, changes since initialization versus width on logarithmic axes, six modules abreast.

    Args:
        report: of a coordinate check. Curves are geometric means over seeds with the range of the seeds;
            later steps are darker.
    """
    with house_style():
        columns = min(len(report.modules), _COLUMNS)
        bands = -(-len(report.modules) // columns)
        figure = Figure(figsize=(1.2 + 2.2 * columns, 0.4 + 4.4 * bands), layout="constrained")
        grid = figure.subplots(2 * bands, columns, squeeze=False, sharex=True)
        for axes in grid.flat:
            axes.set_axis_off()
        for k, name in enumerate(report.modules):
            band, column = divmod(k, columns)
            for row, values in enumerate((report.sizes, report.changes)):
                axes = grid[2 * band + row, column]
                axes.set_axis_on()
                for step in range(row, report.steps + 1):
                    colour = colormaps["viridis"](0.92 - 0.8 * step / max(report.steps, 1))
                    _band(axes, report.widths, values[:, :, step, k], colour, f"step {step}")
                axes.set(xscale="log", yscale="log")
                _at_least_a_decade(axes)
                _ticks(axes, report.widths)
                axes.tick_params(labelbottom=row == 1)
                if column == 0:
                    axes.set_ylabel(f"{report.record} of change" if row else f"{report.record} (size)")
                if row == 0:
                    axes.set_title(name)
                else:
                    axes.set_xlabel("width")
        grid[0, 0].legend(fontsize="x-small")
        figure.suptitle(f"coordinate check: {report.verdict().outcome}")
        return figure


def sweep_figure(report: "TransferReport") -> Figure:
    """Loss versus learning rate, one curve per width, with the optimum of each.

    Args:
        report: of `lr_sweep`. Curves are means over seeds with their range; runs that diverged leave a gap.
    """
    with house_style():
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        rates = np.array(report.lrs)
        for number, width in enumerate(report.widths):
            colour = f"C{number % len(PALETTE)}"
            losses = np.where(np.isfinite(report.losses[number]), report.losses[number], np.nan)
            axes.fill_between(rates, losses.min(1), losses.max(1), color=colour, alpha=0.15, linewidth=0.0)
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(
                rates, losses.mean(1), color=colour, marker=marker, markersize=4, label=f"width {width}"
            )
            best = report.optimum(width)
            if best.lr is not None:
                axes.axvline(best.lr, color=colour, linestyle="dotted", linewidth=1.2)
        axes.set(xscale="log", xlabel="learning rate at base width", ylabel="loss")
        axes.set_title(f"shift of the optimum: {report.shift()} octaves")
        axes.legend(fontsize="small")
        return figure


def measure_versus_width(
    axes: Axes,
    widths: Sequence[int],
    curves: Mapping[str, Float[np.ndarray, "widths seeds"]],
    *,
    limits: Mapping[str, float] | None = None,
    ylabel: str = "",
    log: bool = True,
) -> None:
    """A measure versus width: one curve per scheme with a band over seeds, infinite-width values dashed.

    Args:
        axes: where to draw.
        widths: increasing.
        curves: scheme -> value at each width and seed. The curve is the mean over seeds, the band reaches
            from the lowest to the highest; on a logarithmic axis values <= 0 leave a gap.
        limits: scheme -> value at infinite width, drawn as a dashed line in the colour of its curve.
        ylabel: name of the measure.
        log: whether the measure's axis is logarithmic; that of width always is.

    Raises:
        ValueError: if a curve does not have a row per width, or a limit has no curve.
    """
    limits = limits or {}
    if unknown := sorted(set(limits) - set(curves)):
        raise ValueError(f"limits must be among curves ({', '.join(curves)}), got {', '.join(unknown)}")
    for name, values in curves.items():
        if np.ndim(values) != 2 or len(values) != len(widths):
            raise ValueError(
                f"curves[{name!r}] must have shape ({len(widths)}, seeds), got {np.shape(values)}"
            )
    for number, (name, values) in enumerate(curves.items()):
        colour = f"C{number % len(PALETTE)}"
        marker = _MARKERS[number % len(_MARKERS)]
        found = np.asarray(values, np.float64)
        shown = np.where(found > 0.0, found, np.nan) if log else found
        axes.fill_between(widths, shown.min(1), shown.max(1), color=colour, alpha=0.15, linewidth=0.0)
        axes.plot(widths, shown.mean(1), color=colour, marker=marker, markersize=4, label=name)
        if name in limits:
            axes.axhline(limits[name], color=colour, linestyle="dashed", label=f"{name}, infinite width")
    axes.set(xscale="log", yscale="log" if log else "linear", xlabel="width", ylabel=ylabel)
    _ticks(axes, widths)
    axes.legend(fontsize="small")


def house_style() -> Any:
    """Context manager: the colours and lines of this module's figures, whatever the user's matplotlibrc."""
    return matplotlib.style.context(["default", STYLE])


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in one step; the same figure gives the same bytes.

    Args:
        figure: what to write.
        path: the file; its suffix is the format.

    Raises:
        ValueError: if matplotlib does not know the format.
    """
    kind = Path(path).suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise ValueError(f"path must end in one of {known}, got {str(path)!r}")
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with house_style():
        figure.savefig(buffer, format=kind, metadata=dates.get(kind), dpi=150)
    _files.write_bytes(path, buffer.getvalue())


def _band(axes: Axes, widths: Sequence[int], values: np.ndarray, colour: Any, label: str) -> None:
    """Geometric mean over seeds with the seeds' range; values that have no logarithm leave a gap."""
    shown = np.where(np.isfinite(values) & (values > 0.0), values, np.nan)
    axes.fill_between(widths, shown.min(1), shown.max(1), color=colour, alpha=0.15, linewidth=0.0)
    mean = np.exp(np.log(shown).mean(1))
    axes.plot(widths, mean, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)


def _at_least_a_decade(axes: Axes) -> None:
    """Curves that differ by noise alone shall look flat."""
    low, high = axes.get_ylim()
    if high < 10.0 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10.0**0.5, middle * 10.0**0.5)


def _ticks(axes: Axes, widths: Sequence[int]) -> None:
    axes.set_xticks(list(widths), [str(width) for width in widths], rotation=45, fontsize="small")
    axes.minorticks_off()
