"""Sweeps whose optimum is known: a parabola in log2(lr) around a point that depends on width."""

import json
import math

import numpy as np
import pytest

from mup_features.transfer import TransferReport, lr_sweep

WIDTHS = (64, 256, 1024)
LRS = tuple(2.0**k for k in range(-12, -3))


def falling(width, lr, seed):
    """Best rate 2^-7.3 at width 64, half an octave lower per octave of width; at top level, to pickle."""
    best = -7.3 - 0.5 * math.log2(width / 64)
    return 1.0 + 0.1 * (math.log2(lr) - best) ** 2 + 0.01 * seed


def flat(width, lr, seed):
    return 1.0 + 0.1 * (math.log2(lr) + 7.3 + 0.05 * seed) ** 2


def test_optimum_is_the_vertex_of_the_parabola():
    report = lr_sweep(flat, WIDTHS, LRS, [0])
    best = report.optimum(64)
    assert math.log2(best.lr) == pytest.approx(-7.3, abs=1e-9)  # exact for a parabola, but for rounding
    assert best.loss == pytest.approx(1.0, abs=1e-9)
    assert report.warnings() == []


def test_uneven_grids_find_the_same_vertex():
    uneven = (2.0**-11, 2.0**-8.5, 2.0**-7, 2.0**-4)
    assert math.log2(lr_sweep(flat, WIDTHS, uneven, [0]).optimum(256).lr) == pytest.approx(-7.3, abs=1e-9)


def test_shift_is_counted_in_octaves_from_smallest_to_largest_width():
    shift = lr_sweep(falling, WIDTHS, LRS, [0, 1, 2]).shift()
    assert shift == pytest.approx((-2.0, -2.0, -2.0), abs=1e-9)
    assert lr_sweep(flat, WIDTHS, LRS, [0, 1, 2]).shift().value == pytest.approx(0.0, abs=1e-9)


def test_interval_of_the_shift_covers_the_spread_of_seeds():
    rng = np.random.default_rng(1)
    wobble = {(w, s): rng.normal(0.0, 0.3) for w in WIDTHS for s in range(8)}

    def noisy(width, lr, seed):
        return (math.log2(lr) + 7.3 + wobble[width, seed]) ** 2

    report = lr_sweep(noisy, WIDTHS, LRS, range(8))
    shift = report.shift()
    # a parabola's mean over seeds has its vertex at the mean of the seeds' vertices
    differences = np.array([wobble[64, s] - wobble[1024, s] for s in range(8)])
    assert shift.value == pytest.approx(differences.mean(), abs=1e-9)
    spread = differences.std() / math.sqrt(8)
    assert (
        2.5 * spread < shift.high - shift.low < 4.5 * spread
    )  # 2 * 1.96 standard errors, quantiles of a bootstrap
    assert report.shift() == shift


def test_two_seeds_give_no_interval():
    assert lr_sweep(flat, WIDTHS, LRS, [0, 1]).shift()[1:] == (-math.inf, math.inf)


def test_diverged_runs_stay_and_are_never_the_optimum():
    def train(width, lr, seed):
        if lr > 2.0**-7 and seed == 1:
            return math.nan if width == 64 else math.inf
        return flat(width, lr, 0)

    report = lr_sweep(train, WIDTHS, LRS, [0, 1])
    assert math.isnan(report.losses[0, -1, 1])
    assert report.losses[1, -1, 1] == math.inf
    best = report.optimum(64)
    assert (best.lr, best.beside_divergence) == (2.0**-7, True)
    assert "beside a rate that diverged" in str(report)


def test_a_width_at_which_everything_diverges_has_no_optimum():
    report = lr_sweep(lambda w, lr, s: math.nan if w == 1024 else flat(w, lr, s), WIDTHS, LRS, [0, 1, 2])
    assert report.optimum(1024).lr is None
    assert math.isnan(report.shift().value)
    assert report.warnings() == ["width 1024: every learning rate diverged"]


def test_optimum_at_the_edge_of_the_grid_is_flagged():
    report = lr_sweep(flat, WIDTHS, [2.0**-6, 2.0**-5, 2.0**-4], [0])
    assert report.optimum(64).at_edge
    assert "edge of the grid" in report.warnings()[0]


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "sweep.json"
    calls = []

    def interrupted(width, lr, seed):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append((width, lr, seed))
        return math.inf if len(calls) == 2 else falling(width, lr, seed)

    with pytest.raises(KeyboardInterrupt):
        lr_sweep(interrupted, WIDTHS, LRS, [0, 1], resume=path)
    assert len(json.loads(path.read_text())["runs"]) == 5
    again = []

    def rest(width, lr, seed):
        again.append((width, lr, seed))
        return falling(width, lr, seed)

    report = lr_sweep(rest, WIDTHS, LRS, [0, 1], resume=path)
    assert len(again) == len(WIDTHS) * len(LRS) * 2 - 5
    assert not set(again) & set(calls)
    assert report.losses[0, 0, 1] == math.inf
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.json"]


def test_a_file_that_is_no_sweep_is_refused(tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="resume must be a file of lr_sweep"):
        lr_sweep(flat, WIDTHS, LRS, [0], resume=path)


def test_several_processes_find_the_same_losses():
    one = lr_sweep(falling, WIDTHS[:2], LRS[:3], [0, 1])
    two = lr_sweep(falling, WIDTHS[:2], LRS[:3], [0, 1], workers=2)
    np.testing.assert_array_equal(one.losses, two.losses)


def test_json_round_trip_keeps_every_number():
    report = lr_sweep(lambda w, lr, s: math.nan if lr > 0.01 else falling(w, lr, s), WIDTHS, LRS, [0, 1, 2])
    again = TransferReport.from_json(report.to_json())
    np.testing.assert_array_equal(again.losses, report.losses)
    assert again.lrs == report.lrs
    assert str(again) == str(report)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"widths": [64]}, "widths must be positive, increasing and at least 2"),
        ({"lrs": [0.1, 0.01, 0.001]}, "lrs must be positive, increasing"),
        ({"lrs": [0.1, 0.2]}, "at least 3"),
        ({"lrs": [0.1, 0.2, math.inf]}, "lrs must be positive"),
        ({"seeds": []}, "seeds must be distinct"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
    ],
)
def test_bad_grids_are_refused_before_any_run(changed, words):
    def never(width, lr, seed):
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=words):
        lr_sweep(never, **({"widths": WIDTHS, "lrs": LRS, "seeds": [0]} | changed))


def test_a_loss_that_is_no_number_names_its_run():
    def silent(width, lr, seed):
        return None

    with pytest.raises(TypeError, match=r"must return a number, got None for \(width, lr, seed\) = \(64,"):
        lr_sweep(silent, WIDTHS, LRS, [0])
