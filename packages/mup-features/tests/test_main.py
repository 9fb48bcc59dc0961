"""The command line: what it prints, what it writes, and its exit status."""

import csv
import json

import numpy as np
import pytest

from mup_features.__main__ import main
from mup_features.coordinates import CoordReport


def test_table_shows_the_parametrizations_asked_for(capsys):
    assert main(["table", "mup", "--optimizer", "sgd"]) == 0
    printed = capsys.readouterr().out
    assert "| hidden | n^-1 | eta | 0 | 0.5 | 0 |" in printed
    assert "ntp" not in printed
    assert main(["table", "--json", "--base-width", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == ["mup", "ip", "mfp", "ntp", "sp", "sp_const"]
    assert found[0]["base_width"] == 64


def test_classify_gives_the_r_of_every_preset(capsys):
    assert main(["classify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # spec c1: muP 0, NTP 1/2, SP 1/2, SP with a constant rate -1, mean field 0
    assert {name: regime["r"] for name, regime in found.items() if name != "ip"} == {
        "mup": 0.0,
        "mfp": 0.0,
        "ntp": 0.5,
        "sp": 0.5,
        "sp_const": -1.0,
    }


def test_classify_takes_exponents(capsys):
    assert main(["classify", "--a=-0.5,0,0.5", "--b", "0.5,0.5,0.5", "--c", "0,0,0", "--depth", "5"]) == 0
    assert capsys.readouterr().out.startswith("abc: r = 0, stable, feature learning")


CHECK = ["coord-check", "--widths", "32,64,128,256", "--seeds", "4", "--steps", "2"]


def test_classify_refuses_a_depth_that_the_parametrization_does_not_have(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["classify", "mfp", "--depth", "3"])
    assert ended.value.code == 2
    assert "depth must be 1 for 'mfp', got 3" in capsys.readouterr().err
    assert main(["classify", "--depth", "3"]) == 0  # all of them: mfp has one hidden layer


def test_coordinate_check_passes_with_status_0_and_writes_its_files(capsys, tmp_path):
    pytest.importorskip("torch")
    files = ["--csv", str(tmp_path / "check.csv"), "--png", str(tmp_path / "check.png")]
    assert main([*CHECK, *files]) == 0
    assert "PASS" in capsys.readouterr().out
    with (tmp_path / "check.csv").open() as stream:
        assert {row["width"] for row in csv.DictReader(stream)} == {"32", "64", "128", "256"}
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_coordinate_check_fails_with_status_1(capsys):
    pytest.importorskip("torch")
    assert main([*CHECK, "--parametrization", "sp", "--json"]) == 1
    assert CoordReport.from_json(capsys.readouterr().out).verdict().outcome == "FAIL"


def test_coordinate_check_that_cannot_be_decided_has_status_3():
    pytest.importorskip("torch")
    assert (
        main(["coord-check", "--widths", "16,32", "--seeds", "1", "--steps", "2", "--optimizer", "sgd"]) == 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mult", "pure", "symmetric"])
def test_a_torch_transformer_passes_under_mup(form):
    pytest.importorskip("torch")
    arguments = ["--model", "transformer", "--optimizer", "adamw", "--widths", "64,256,1024", "--steps", "2"]
    assert main(["coord-check", *arguments, "--seeds", "5", "--form", form]) == 0


@pytest.mark.slow
def test_a_torch_transformer_fails_without_mup():
    pytest.importorskip("torch")
    arguments = ["--model", "transformer", "--parametrization", "sp", "--widths", "64,256", "--steps", "2"]
    assert main(["coord-check", *arguments, "--seeds", "3"]) == 1


LIMIT = [
    "limit",
    "--samples",
    "64",
    "--replicas",
    "2",
    "--depth",
    "1",
    "--activation",
    "identity",
    "--steps",
    "3",
]


def test_limit_writes_the_trajectory_of_the_reference(tmp_path):
    jax = pytest.importorskip("jax")
    np.savez(tmp_path / "data.npz", X=[[1.0, 0.5], [-0.3, 0.8]], y=[1.0, -0.5])
    before = jax.config.read("jax_enable_x64")
    data = ["--data", str(tmp_path / "data.npz"), "--reduction", "sum", "--lr", "0.3"]
    assert main([*LIMIT, *data, "--output", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as found:
        # R1 of the spec, exact for the identity at any number of samples
        expected = [[0.72, -0.159], [0.941992708239, -0.3076437789], [0.989617508124, -0.405069342141]]
        np.testing.assert_allclose(found["f"][1:, :, 0], expected, atol=1e-11)
        assert found["f_stderr"].max() < 1e-11
    assert jax.config.read("jax_enable_x64") == before


def test_limit_prints_a_table_and_writes_json(capsys, tmp_path):
    pytest.importorskip("jax")
    assert main(LIMIT) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    assert main([*LIMIT, "--output", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["loss"]) == 4


def test_report_compares_two_snapshots(capsys, tmp_path):
    from mup_features.metrics import FeatureSnapshot

    features = np.random.default_rng(0).normal(size=(2, 4, 16))
    for name, values in zip(("before", "after"), features, strict=True):
        FeatureSnapshot.from_arrays({"fc": values}, tag=name).save(tmp_path / f"{name}.npz")
    paths = [str(tmp_path / "before.npz"), str(tmp_path / "after.npz")]
    assert main(["report", *paths, "--plot", str(tmp_path / "report.png")]) == 0
    assert "fc" in capsys.readouterr().out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", *paths, "--json"]) == 0
    assert "fc" in json.loads(capsys.readouterr().out)["measures"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["table", "sgd"], "name must be one of"),
        (["table", "--base-width", "0"], "must be an integer >= 1, got '0'"),
        (["classify", "--a", "0,x"], "must be numbers joined by commas, got '0,x'"),
        (["classify", "--b", "0,1,1"], "exponents must be given as --a and --b"),
        (["coord-check", "--widths", "64"], "widths must be increasing"),
        (["coord-check", "--widths", "30,64", "--model", "transformer"], "widths must be multiples of 4"),
        (["limit", "--output", "trajectory.txt"], "--output must end in .npz or .json"),
        (["limit", "--data", "no_such_file.npz"], "no_such_file.npz"),
        (["report", "no_such_file.npz", "other.npz"], "no_such_file.npz"),
    ],
)
def test_wrong_words_end_with_status_2_and_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_a_missing_framework_ends_with_status_4_and_what_to_install(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("mup_features.torch")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stopped:
        main(["coord-check"])
    assert stopped.value.code == 4
    assert 'pip install "mup-features[torch]"' in capsys.readouterr().err
