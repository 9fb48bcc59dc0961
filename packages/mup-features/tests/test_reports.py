"""Comparing two snapshots: numbers, what cannot be compared, and the forms of the report."""

import json

import numpy as np
import pytest

from mup_features import metrics
from mup_features.metrics import FeatureSnapshot, compare
from mup_features.plots_features import report_figure

N, n = 4, 80


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    first = {"fc1": rng.standard_normal((N, n)), "fc2": rng.standard_normal((N, n))}
    second = {name: A + 0.5 * rng.standard_normal((N, n)) for name, A in first.items()}
    return first, second


def snapshots(pair, **options):
    return FeatureSnapshot.from_arrays(pair[0], "init"), FeatureSnapshot.from_arrays(
        pair[1], "end", **options
    )


def test_a_report_holds_the_measures_of_each_layer(pair):
    y, labels = np.array([1.0, -1, 1, -1]), [0, 1, 0, 1]
    report = compare(*snapshots(pair), targets=y, labels=labels)
    A0, A = pair[0]["fc2"], pair[1]["fc2"]
    K0, K = metrics.gram(A0), metrics.gram(A)
    expected = {
        "change": metrics.change(A, A0),
        "absolute_change": metrics.change(A, A0, relative=False),
        "joint_lambda_min": metrics.joint_lambda_min([A0, A]),
        "lambda_min_before": metrics.lambda_min(K0),
        "effective_rank_after": metrics.effective_rank(K),
        "centred_lambda_min_after": metrics.centred_lambda_min(K),
        "kernel_distance": metrics.kernel_distance(K0, K),
        "relative_frobenius_change": metrics.relative_frobenius_change(K0, K),
        "cka": metrics.linear_cka(K0, K),
        "cka_unbiased": metrics.linear_cka(K0, K, unbiased=True),
        "alignment_after": metrics.kernel_target_alignment(K, y),
        "neural_collapse_before": metrics.neural_collapse(K0, labels),
        "class_separation_after": metrics.class_separation(K, labels),
        "dead_after": 0.0,
        "mean_angle_change": np.abs(metrics.angle_matrix(K) - metrics.angle_matrix(K0)).mean(),
    }
    found = report.measures["fc2"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert report.notes == ()
    assert report.spectra["fc2"]["joint"].shape == (2 * N,)


def test_a_recorded_reference_gives_the_numbers_of_kept_features(pair):
    kept = compare(*snapshots(pair))
    init = FeatureSnapshot.from_arrays(pair[0], "init")
    end = FeatureSnapshot.from_arrays(pair[1], "end", reference=init, keep_features=False)
    light = FeatureSnapshot.from_arrays(pair[0], "init", keep_features=False)
    streamed = compare(light, end)
    for layer, expected in kept.measures.items():
        assert streamed.measures[layer] == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_unchanged_features_have_no_change_and_no_joint_diversity(pair):
    init = FeatureSnapshot.from_arrays(pair[0], "init")
    found = compare(init, FeatureSnapshot.from_arrays(pair[0], "end")).measures["fc1"]
    assert found["change"] == 0
    assert abs(found["joint_lambda_min"]) < 1e-14
    assert found["cka"] == pytest.approx(1, rel=1e-12)


def test_times_in_between_enlarge_the_joint_gram(pair):
    middle = {name: np.random.default_rng(9).standard_normal(A.shape) for name, A in pair[0].items()}
    report = compare(*snapshots(pair), between=[FeatureSnapshot.from_arrays(middle, "half")])
    expected = metrics.joint_lambda_min([pair[0]["fc1"], middle["fc1"], pair[1]["fc1"]])
    assert report.measures["fc1"]["joint_lambda_min"] == pytest.approx(expected, rel=1e-12)


def test_a_narrow_layer_is_noted_since_its_joint_diversity_may_be_chance(pair):
    narrow = [{name: A[:, :30] for name, A in arrays.items()} for arrays in pair]
    assert "width 30 is below 4 x 8 rows" in compare(*snapshots(narrow)).notes[0]


def test_what_cannot_be_measured_is_missing_and_the_notes_say_why(pair):
    first = {"fc1": pair[0]["fc1"], "dead": np.zeros((N, n))}
    second = {"fc1": pair[1]["fc1"], "dead": pair[1]["fc2"], "new": pair[1]["fc2"]}
    report = compare(
        FeatureSnapshot.from_arrays(first, "init", keep_features=False),
        FeatureSnapshot.from_arrays(second, "end"),
        labels=[0, 0, 1, 1],
    )
    assert "change" not in report.measures["fc1"]
    assert "kernel_distance" not in report.measures["dead"] and "cka" not in report.measures["dead"]
    notes = "\n".join(report.notes)
    for words in ("'new' is only in one", "'fc1': no change", "'dead' is zero for every sample"):
        assert words in notes


def test_snapshots_that_do_not_belong_together_are_refused(pair):
    init, end = snapshots(pair)
    narrow = FeatureSnapshot.from_arrays({name: A[:, :9] for name, A in pair[1].items()}, "end")
    fewer = FeatureSnapshot.from_arrays({name: A[:3] for name, A in pair[1].items()}, "end")
    foreign = FeatureSnapshot.from_arrays(pair[1], "end", reference=pair[1], keep_features=False)
    keyed = [
        FeatureSnapshot.from_arrays(pair[0], "t", sample_keys=keys) for keys in (np.arange(4.0), np.ones(4))
    ]
    for first, second, message in [
        (init, FeatureSnapshot.from_arrays({"other": pair[0]["fc1"]}, "t"), "must share a layer"),
        (init, narrow, r"one \(width, sketch\) in all snapshots, got \(80, None\) and \(9, None\)"),
        (init, fewer, "must have the 4 samples of 'init', got 3"),
        (init, foreign, "recorded against another reference"),
        (*keyed, "the inputs differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(first, second)
    light = FeatureSnapshot.from_arrays(pair[1], "half", keep_features=False)
    with pytest.raises(ValueError, match="between needs snapshots that kept their features"):
        compare(init, end, between=[light])


def test_json_keeps_raw_spectra_and_the_table_clips_them(pair, tmp_path):
    init = FeatureSnapshot.from_arrays(pair[0], "init")
    report = compare(init, FeatureSnapshot.from_arrays(pair[0], "end"))
    # Rounding decides the sign of a zero eigenvalue; the report must show the same for both.
    report.measures["fc1"]["joint_lambda_min"] = report.spectra["fc1"]["joint"][0] = -3e-17
    text = report.to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == json.loads(text)
    assert stored["spectra"]["fc1"]["joint"][0] == stored["measures"]["fc1"]["joint_lambda_min"] == -3e-17
    row = next(line for line in report.to_markdown().splitlines() if line.startswith("| `fc1`"))
    head = report.to_markdown().splitlines()[2].split(" | ")
    assert row.split(" | ")[head.index("joint lambda_min")] == "0"


def test_an_infinite_change_is_valid_json(pair):
    zero = {name: np.zeros((N, n)) for name in pair[0]}
    report = compare(FeatureSnapshot.from_arrays(zero, "init"), FeatureSnapshot.from_arrays(pair[1], "end"))
    assert report.measures["fc1"]["change"] == np.inf
    assert float(json.loads(report.to_json())["measures"]["fc1"]["change"]) == np.inf


def test_the_figure_is_written_whole_for_any_report(pair, tmp_path):
    zero = {"fc1": np.zeros((N, n)), "fc2": pair[0]["fc2"]}
    report = compare(FeatureSnapshot.from_arrays(zero, "init"), snapshots(pair)[1])
    figure = report_figure(report)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[1] == "lambda_min" and titles[8].startswith("fc2: eigenvalues")
    joint = next(line for line in figure.axes[8].lines if line.get_label() == "joint")
    assert joint.get_ydata() == pytest.approx(report.spectra["fc2"]["joint"][::-1])
    small = [FeatureSnapshot.from_arrays({"fc1": arrays["fc1"]}, "t") for arrays in (zero, pair[1])]
    compare(*small).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
