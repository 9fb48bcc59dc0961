"""Reports of coordinate checks, built from sizes whose slopes are known."""

import csv
import math

import numpy as np
import pytest

from mup_features.coordinates import CoordReport

WIDTHS = (64, 128, 256, 512)


def report(exponents, *, seeds=4, steps=3, noise=0.01, outputs=("out",), **changed):
    """Changes C width^p t with lognormal noise over seeds; p by module."""
    rng = np.random.default_rng(0)
    n = np.array(WIDTHS, float)[:, None, None, None]
    p = np.array(list(exponents.values()))
    spread = np.exp(noise * rng.standard_normal((len(WIDTHS), seeds, steps + 1, len(p))))
    changes = n**p * np.arange(steps + 1)[:, None] * spread
    given = {"sizes": 1.0 + changes, "changes": changes} | changed
    return CoordReport(WIDTHS, tuple(range(seeds)), tuple(exponents), outputs, **given)


def test_slopes_are_the_exponents_of_the_sizes():
    found = report({"fc": 0.5, "out": -0.25}, noise=0.0)
    assert found.slope("fc", 3).value == pytest.approx(0.5, abs=1e-12)  # a fit without noise: rounding only
    assert found.slope("out", 1).value == pytest.approx(-0.25, abs=1e-12)
    assert found.steps == 3


def test_interval_of_a_slope_is_students_over_the_slopes_of_seeds():
    found = report({"out": 0.0}, noise=0.2).slope("out", 2)
    x, y = np.log(WIDTHS), np.log(report({"out": 0.0}, noise=0.2).changes[:, :, 2, 0])
    slopes = np.polyfit(x, y, 1)[0]
    half = 3.182446305284263 * slopes.std(ddof=1) / 2  # t quantile at 0.975 with 3 degrees of freedom
    assert found == pytest.approx((slopes.mean(), slopes.mean() - half, slopes.mean() + half), abs=1e-9)


def test_flat_changes_pass():
    verdict = report({"fc": 0.02, "out": -0.03}).verdict()
    assert verdict.passed
    assert {(judged.module, judged.step) for judged in verdict.judged} == {
        (module, step) for module in ("fc", "out") for step in (2, 3)
    }


@pytest.mark.parametrize("exponent", [0.5, -0.5])
def test_a_change_that_grows_or_dies_with_width_fails_and_is_named(exponent):
    verdict = report({"fc": 0.0, "deep": exponent, "out": 0.0}).verdict()
    assert verdict.outcome == "FAIL"
    assert verdict.reasons[0].startswith("deep: changes with width")


def test_an_interval_astride_the_limit_is_inconclusive():
    assert report({"out": 0.15}, noise=0.3).verdict().outcome == "INCONCLUSIVE"


def test_two_seeds_support_no_verdict():
    verdict = report({"out": 0.0}, seeds=2).verdict()
    assert verdict.outcome == "INCONCLUSIVE"
    assert "2 seeds" in str(verdict)


def test_sizes_are_not_judged():
    flat = report({"fc": 0.0, "out": 0.0})
    growing = np.array(WIDTHS)[:, None, None, None] * np.ones_like(flat.changes)
    assert report({"fc": 0.0, "out": 0.0}, sizes=growing).verdict().passed


def test_output_that_shrinks_at_the_start_is_explained_and_passes():
    flat = report({"fc": 0.0, "out": 0.0})
    sizes, changes = flat.sizes.copy(), flat.changes.copy()
    shrinking = np.array(WIDTHS, float)[:, None] ** -0.5
    sizes[:, :, 0, 1], changes[:, :, 1, 1] = shrinking, shrinking
    verdict = report({"fc": 0.0, "out": 0.0}, sizes=sizes, changes=changes).verdict()
    assert verdict.passed
    assert sum("small readout" in reason for reason in verdict.reasons) == 2


def test_modules_that_never_move_are_left_out_and_named():
    flat = report({"mask": 0.0, "out": 0.0})
    changes = flat.changes.copy()
    changes[..., 0] = 0.0
    verdict = report({"mask": 0.0, "out": 0.0}, changes=changes).verdict()
    assert verdict.passed
    assert any("mask: does not move" in reason for reason in verdict.reasons)


def test_a_change_that_is_zero_at_one_width_only_is_not_passed():
    flat = report({"out": 0.0})
    changes = flat.changes.copy()
    changes[-1] = 0.0
    assert report({"out": 0.0}, changes=changes).verdict().outcome == "INCONCLUSIVE"


def test_divergence_fails_with_its_width_and_step():
    flat = report({"out": 0.0})
    sizes = flat.sizes.copy()
    sizes[3, 1, 2:] = math.inf
    verdict = report({"out": 0.0}, sizes=sizes).verdict()
    assert verdict.outcome == "FAIL"
    assert verdict.reasons[0] == "width 512: not finite from step 2 on"


def test_too_few_steps_leave_nothing_to_judge():
    assert report({"out": 0.0}, steps=1).verdict().outcome == "INCONCLUSIVE"


def test_json_round_trip_keeps_every_number():
    flat = report({"fc": 0.3, "out": 0.0})
    sizes = flat.sizes.copy()
    sizes[0, 0, 1, 0], sizes[1, 0, 1, 0] = math.inf, math.nan
    first = report({"fc": 0.3, "out": 0.0}, sizes=sizes)
    again = CoordReport.from_json(first.to_json())
    assert again.to_json() == first.to_json()
    np.testing.assert_array_equal(again.sizes, first.sizes)
    with pytest.raises(ValueError, match="missing: widths"):
        CoordReport.from_json("{}")


def test_csv_has_a_line_for_every_number_and_leaves_nothing_beside_it(tmp_path):
    found = report({"fc": 0.3, "out": 0.0})
    found.to_csv(tmp_path / "check.csv")
    with (tmp_path / "check.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == found.sizes.size
    assert float(rows[-1]["rms_of_change"]) == found.changes[-1, -1, -1, -1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["check.csv"]


def test_markdown_shows_slopes_and_verdict():
    text = str(report({"fc": 0.5, "out": 0.0}))
    assert "| out (output) |" in text
    assert "FAIL" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"widths": (64,)}, "widths must be increasing"),
        ({"widths": (128, 64, 256, 512)}, "widths must be increasing"),
        ({"seeds": (1, 1, 2, 3)}, "seeds must be distinct"),
        ({"modules": ("a", "a")}, "modules must be distinct"),
        ({"outputs": ("b",)}, r"outputs must be among modules, got \['b'\]"),
        ({"sizes": np.ones((4, 4, 3, 2))}, "changes must have the shape"),
        ({"sizes": np.ones((4, 4, 3))}, "sizes must have shape"),
        ({"sizes": -np.ones((4, 4, 4, 2))}, "sizes must be >= 0"),
        ({"record": "max"}, "record must be 'rms' or 'l1', got 'max'"),
    ],
)
def test_bad_reports_are_refused(changed, words):
    good = report({"fc": 0.0, "out": 0.0})
    fields = ("widths", "seeds", "modules", "outputs", "sizes", "changes", "record")
    with pytest.raises(ValueError, match=words):
        CoordReport(**{name: getattr(good, name) for name in fields} | changed)


def test_bad_questions_are_refused():
    found = report({"out": 0.0})
    for call, words in (
        (lambda: found.slope("fc", 1), "module must be one of out"),
        (lambda: found.slope("out", 9), r"step must be in \[0, 3\], got 9"),
        (lambda: found.slope("out", 1, "mean"), "quantity must be"),
        (lambda: found.verdict(0.0), "threshold must be > 0"),
        (lambda: found.verdict(from_step=0), "from_step must be >= 1"),
        (lambda: found.verdict(level=1.0), "level must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
