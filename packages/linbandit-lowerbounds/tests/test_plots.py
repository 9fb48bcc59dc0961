"""Pictures hold the numbers they were given, under their names, in the colours of the style."""

import importlib
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from linbandit_lowerbounds import plots
from linbandit_lowerbounds.certify import Certificate, GapSweep, Row
from linbandit_lowerbounds.intervals import Estimate

mpl.use("agg")


@pytest.fixture
def axes():
    return Figure().subplots()


def around(*values):
    return [Estimate(value, 0.9 * value, 1.2 * value) for value in values]


def line(axes, label):
    (found,) = [one for one in axes.get_lines() if one.get_label() == label]
    return found


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def draw(axes):
    """Renders: errors of labels and limits show up only then."""
    axes.figure.savefig("/dev/null", format="png")


def sweep(name, values, bounds=(0.1, 0.5, 0.0)):
    return GapSweep(name, 2, 9.0, (0.5, 1.0, 2.0), tuple(around(*values)), tuple(bounds))


def row(family, S, x, regret, bounds):
    intervals = {name: Estimate(1.0, 1.0, 1.0) for name in bounds}
    share = Estimate(1.0, 0.9, 1.0)
    (mean,) = around(regret)
    return Row(family, 4, 100, S, x, None, mean, mean, bounds, intervals, share, share, False)


def test_a_sandwich_shows_curves_bounds_and_scaled_rates(axes):
    plots.sandwich(
        axes,
        [2, 4, 8],
        {"theorem": [0.0, 0.0, 0.0], "tight": [0.0, 2.0, 4.0]},
        {"greedy": around(3, 6, 12), "OFUL": around(5, 9, 20)},
        {"d sqrt(S)": [1.0, 2.0, 4.0]},
        quantity="d",
    )
    assert legend(axes) == [
        "greedy",
        "OFUL",
        "theorem (0: a condition fails)",
        "tight",
        "rate d sqrt(S) (scaled)",
    ]
    np.testing.assert_array_equal(line(axes, "OFUL").get_xydata(), [[2, 5], [4, 9], [8, 20]])
    np.testing.assert_array_equal(line(axes, "tight").get_ydata(), [np.nan, 2.0, 4.0])
    # Scaled to meet the highest curve, OFUL's 5, at the first x.
    np.testing.assert_array_equal(line(axes, "rate d sqrt(S) (scaled)").get_ydata(), [5.0, 10.0, 20.0])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("dimension d", "regret")
    band = axes.collections[0].get_paths()[0].vertices
    assert {(2.0, 2.7), (2.0, 3.6)} <= {tuple(np.round(point, 6)) for point in band}
    draw(axes)


def test_learners_take_the_cycle_and_theory_one_colour_of_its_own(axes):
    curves = {f"learner {i}": around(i + 1, i + 2) for i in range(7)}
    plots.sandwich(axes, [1, 2], {"lemma": [1, 2]}, curves, quantity="K")
    colours = [to_hex(line(axes, name).get_color()) for name in curves]
    assert colours[:5] == [to_hex(f"C{i}") for i in range(5)]
    assert colours[5:] == colours[:2]
    styles = {(line(axes, name).get_color(), line(axes, name).get_marker()) for name in curves}
    assert len(styles) == len(curves)
    assert to_hex(line(axes, "lemma").get_color()) == to_hex("C5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [2, 1]}, "x must be increasing"),
        ({"x": [0, 1]}, "x must be increasing"),
        ({"x": []}, "x must be increasing"),
        ({"curves": {}}, "curves must hold"),
        ({"curves": {"a": around(1)}}, r"curves\['a'\] must have 2"),
        ({"bounds": {"b": [1]}}, r"bounds\['b'\] must have 2"),
        ({"rates": {"r": [1]}}, r"rates\['r'\] must have 2"),
        ({"quantity": "A"}, "quantity must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_sandwich_refuses_what_does_not_fit(axes, change, message):
    good = {"x": [1, 2], "bounds": {}, "curves": {"a": around(1, 2)}}
    with pytest.raises(ValueError, match=message):
        plots.sandwich(axes, **(good | change))


def test_a_gap_profile_marks_the_worst_gap(axes):
    bounds = (0.1, 0.5, 1e-12)
    plots.gap_profile(
        axes, [sweep("greedy", (0.3, 0.9, 0.7), bounds), sweep("OFUL", (0.4, 0.8, 1.1), bounds)]
    )
    assert legend(axes) == ["greedy", "OFUL", r"$\mathrm{LB_{seq}}$"]
    np.testing.assert_array_equal(line(axes, "greedy").get_xydata(), [[0.5, 0.3], [1, 0.9], [2, 0.7]])
    rings = [tuple(one.get_xydata()[0]) for one in axes.get_lines() if one.get_markersize() == 11]
    assert rings == [(1.0, 0.9), (2.0, 1.1)]
    np.testing.assert_array_equal(line(axes, r"$\mathrm{LB_{seq}}$").get_ydata(), bounds)
    assert axes.get_ylim()[0] == pytest.approx(0.01)  # a thirtieth of the least regret
    draw(axes)
    with pytest.raises(ValueError, match="sweeps must hold"):
        plots.gap_profile(axes, [])


def test_a_histogram_counts_runs_and_says_how_many_are_above_half_the_bound(axes):
    regret = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    plots.regret_histogram(axes, regret, 6.0, name="OFUL", bins=4)
    np.testing.assert_array_equal([bar.get_height() for bar in axes.patches], [2, 2, 2, 2])
    at = [one.get_xdata()[0] for one in axes.get_lines()]
    assert at == [3.0, 6.0, 4.5]
    # 6 of 8 runs; Wilson's interval for 6/8 is [0.409, 0.929].
    assert legend(axes)[1] == "LB/2: P = 0.750 [0.409, 0.929] above"
    draw(axes)
    for wrong, bound, message in (
        ([1.0, np.nan], 1.0, "finite"),
        ([], 1.0, "finite"),
        ([1.0], 0.0, "bound must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.regret_histogram(axes, np.array(wrong), bound, name="x")


def test_cyclic_visits_ring_the_sub_instance_that_fits(axes):
    # K = 64, L = 7: 40 rounds of sigma = 1 (group 6) and 24 of sigma = 1/4 (2^(i-1)/64 < 1/4: group 4).
    sigma = np.repeat([1.0, 0.25], [40, 24])
    plots.cyclic_visits(axes, sigma)
    assert legend(axes) == ["group 6: 40 rounds", "group 4: 24 rounds", "tuned to $2^{j-1}$"]
    turns = [[int((np.arange(n) % 7 == j).sum()) for j in range(7)] for n in (40, 24)]
    np.testing.assert_array_equal(line(axes, "group 6: 40 rounds").get_ydata(), turns[0])
    np.testing.assert_array_equal(line(axes, "group 4: 24 rounds").get_ydata(), turns[1])
    rings = [tuple(one.get_xydata()[0]) for one in axes.get_lines() if one.get_markersize() == 12]
    assert rings == [(3, 6), (3, 4)]
    draw(axes)
    with pytest.raises(ValueError, match="sigma_k > 1/K"):
        plots.cyclic_visits(axes, np.zeros(8))


def test_a_certificate_is_drawn_over_the_gap_and_over_the_variance():
    rows = (
        row("scaled", 25.0, 2.0, 8.0, {"scaled_end": 2.0, "scaled_seq": 4.0}),
        row("scaled", 25.0, 0.5, 6.0, {"scaled_end": 3.0, "scaled_seq": 5.0}),
        row("peeling", 30.0, None, 7.0, {"theorem": 0.0, "lemma_sum": 0.0}),
    )
    certificate = Certificate("OFUL", 0.95, 100, False, rows, (rows[0],), {})
    figure = plots.certificate_figure(certificate)
    over_gap, over_variance = figure.axes
    # Regret over d sqrt(S) = 20, sorted by the gap.
    regret = line(over_gap, "d=4, K=100, S=25")
    np.testing.assert_allclose(regret.get_xydata(), [[0.5, 0.3], [2.0, 0.4]])
    (bound,) = [one for one in over_gap.get_lines() if one is not regret]
    np.testing.assert_allclose(bound.get_xydata(), [[0.5, 0.25], [2.0, 0.2]])
    assert legend(over_variance) == ["scaled", "peeling"]
    assert figure.get_suptitle() == "OFUL: consistent with the lower bounds"
    figure.savefig("/dev/null", format="svg")
    with pytest.raises(ValueError, match="at least one row"):
        plots.certificate_figure(Certificate("OFUL", 0.95, 100, False, (), (), {}))


def test_a_certificate_saves_its_own_picture(tmp_path):
    rows = (row("hypercube", 100.0, None, 8.0, {"lemma": 2.0}),)
    Certificate("OFUL", 0.95, 100, False, rows, (), {}).plot(tmp_path / "out.svg")
    assert (tmp_path / "out.svg").stat().st_size > 1000


def test_nothing_is_black_under_a_style_without_black():
    with mpl.rc_context({"text.color": "#e8eaee"}):
        axes = Figure().subplots()
        plots.sandwich(axes, [1, 2], {"lemma": [1, 2]}, {"a": around(1, 2)}, {"r": [1, 2]})
        plots.gap_profile(axes, [sweep("b", (1.0, 2.0, 3.0))])
        plots.regret_histogram(axes, np.arange(5.0), 2.0, name="c")
        plots.cyclic_visits(axes, np.ones(8))
        drawn = [one.get_color() for one in axes.get_lines()]
        drawn += [bar.get_facecolor() for bar in axes.patches]
        assert all(to_rgba(colour)[:3] != (0.0, 0.0, 0.0) for colour in drawn)


def test_a_missing_matplotlib_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "linbandit_lowerbounds.plots")
    with pytest.raises(ImportError, match=r'pip install "linbandit-lowerbounds\[plot\]"'):
        importlib.import_module("linbandit_lowerbounds.plots")
