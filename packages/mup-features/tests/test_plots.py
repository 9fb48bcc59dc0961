"""Figures show what they were given; pixels are not compared."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from mup_features import plots
from mup_features.coordinates import CoordReport
from mup_features.transfer import TransferReport

PNG = b"\x89PNG"


@pytest.fixture
def report():
    changes = np.ones((3, 3, 4, 2)) * np.arange(4)[:, None]
    sizes = changes + 1.0
    sizes[2, 1, 3, 0] = np.inf
    return CoordReport((32, 64, 128), (0, 1, 2), ("fc", "out"), ("out",), sizes, changes)


def test_coordinate_figure_has_two_panels_per_module_and_a_curve_per_step(report):
    sizes_fc, sizes_out, changes_fc, changes_out = plots.coordinate_figure(report).axes
    assert [len(ax.get_lines()) for ax in (sizes_fc, sizes_out, changes_fc, changes_out)] == [4, 4, 3, 3]
    assert sizes_out.get_title() == "out"
    np.testing.assert_allclose(changes_out.get_lines()[-1].get_ydata(), 3.0)


def test_many_modules_stand_six_abreast(report):
    names = tuple(f"layer {k}" for k in range(8))
    wide = CoordReport(report.widths, report.seeds, names, (), *(np.ones((3, 3, 4, 8)) for _ in range(2)))
    figure = plots.coordinate_figure(wide)
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == list(names)
    assert len(figure.axes) == 4 * 6
    assert sum(ax.axison for ax in figure.axes) == 2 * 8


def test_curves_that_differ_by_noise_alone_look_flat(report):
    low, high = plots.coordinate_figure(report).axes[3].get_ylim()
    assert high >= 10.0 * low


def test_reports_save_their_figures_in_one_step(report, tmp_path):
    report.plot(tmp_path / "check.png")
    losses = np.array([[3.0, 1.0, 2.0], [np.inf, 2.0, np.nan]])[..., None] * np.ones(3)
    TransferReport((64, 128), (0.1, 0.2, 0.4), (0, 1, 2), losses).plot(tmp_path / "sweep.svg")
    assert (tmp_path / "check.png").read_bytes().startswith(PNG)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["check.png", "sweep.svg"]


def test_the_same_figure_gives_the_same_bytes(report, tmp_path):
    for name in ("a.svg", "b.svg"):
        report.plot(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_unknown_format_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="path must end in one of"):
        report.plot(tmp_path / "check.doc")
    assert not list(tmp_path.iterdir())


def test_measure_versus_width_draws_means_bands_and_limits():
    axes = Figure().subplots()
    curves = {"muP": np.array([[1.0, 3.0], [2.0, 2.0]]), "IP": np.array([[0.1, 0.1], [-1.0, 0.2]])}
    plots.measure_versus_width(axes, [64, 128], curves, limits={"muP": 2.5}, ylabel="change")
    mup, limit, ip = axes.get_lines()
    np.testing.assert_allclose(mup.get_ydata(), [2.0, 2.0])
    np.testing.assert_allclose(limit.get_ydata(), 2.5)
    assert limit.get_linestyle() == "--"
    assert limit.get_color() == mup.get_color()
    assert np.isnan(ip.get_ydata()[1])  # no logarithm
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["muP", "muP, infinite width", "IP"]


def test_bad_curves_are_refused():
    axes = Figure().subplots()
    with pytest.raises(ValueError, match=r"curves\['a'\] must have shape \(2, seeds\), got \(3, 1\)"):
        plots.measure_versus_width(axes, [1, 2], {"a": np.ones((3, 1))})
    with pytest.raises(ValueError, match="limits must be among curves"):
        plots.measure_versus_width(axes, [1, 2], {"a": np.ones((2, 1))}, limits={"b": 1.0})
