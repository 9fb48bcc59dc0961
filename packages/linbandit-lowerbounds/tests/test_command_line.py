"""The command line: what it prints, the JSON it writes, and one line for wrong input."""

import json

import numpy as np
import pytest

from linbandit_lowerbounds.__main__ import main
from linbandit_lowerbounds.bounds import prefixed_bound
from linbandit_lowerbounds.families import FAMILIES, hypercube_case

LEARNER = """
import numpy as np

class First:
    def act(self, actions, sigma=None):
        return 0
    def update(self, x, reward, sigma=None):
        pass
"""


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(
        "linbandit_lowerbounds.families.FAMILIES",
        {**FAMILIES, "hypercube": lambda: [hypercube_case(64, 2)]},
    )


def test_bound_reads_a_file_and_prints_every_kind(tmp_path, capsys):
    sigma = np.linspace(0.1, 1.0, 200)
    np.save(tmp_path / "sigma.npy", sigma)
    assert main(["bound", "--sigma", str(tmp_path / "sigma.npy"), "--d", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rounds"] == 200
    assert record["bounds"]["scaled_seq"]["value"] == prefixed_bound(sigma, 3, kind="scaled_seq").value
    assert record["bounds"]["theorem"]["value"] == 0.0
    assert not all(record["bounds"]["theorem"]["conditions"].values())


def test_bound_reads_text_and_says_why_a_bound_is_zero(tmp_path, capsys):
    (tmp_path / "sigma.txt").write_text("1\n1\n0.5\n")
    assert main(["bound", "--sigma", str(tmp_path / "sigma.txt"), "--d", "1", "--kind", "theorem"]) == 0
    assert "fails: d_ge_groups, variance_sum_ge_1_plus_384_d2" in capsys.readouterr().out


def test_simulate_saves_what_it_reports(tmp_path, capsys):
    save = tmp_path / "run.npz"
    words = ["simulate", "greedy", "--rounds", "30", "--d", "2", "--seeds", "4", "--save", str(save)]
    assert main(words) == 0
    with np.load(save) as file:
        assert f"{file['regret'].mean():.6g}" in capsys.readouterr().out


def test_certify_runs_somebodys_class_and_writes_json(few, tmp_path, monkeypatch, capsys):
    (tmp_path / "their_module.py").write_text(LEARNER)
    monkeypatch.chdir(tmp_path)
    words = ["certify", "their_module:First", "--family", "hypercube", "--seeds", "4", "--json", "found.json"]
    assert main(words) == 0
    assert "First [Python loop]: consistent with the lower bounds (4 runs" in capsys.readouterr().out
    record = json.loads((tmp_path / "found.json").read_text())
    assert set(record) == {
        "algorithm",
        "verdict",
        "level",
        "n_seeds",
        "sees_theta",
        "rows",
        "worst",
        "exponents",
        "not_run",
    }
    assert set(record["rows"][0]["bounds"]) == {"lemma", "pinsker_half", "tight"}


def test_instances_lists_every_family(capsys):
    assert main(["instances", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in rows} == set(FAMILIES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def act(:", "cannot be imported: SyntaxError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        (
            "class Own:\n"
            "    def act(self, actions): raise KeyError('lost')\n"
            "    def update(self, x, reward): pass\n",
            "act failed in round 0 (from 0) of run 0: KeyError: 'lost'",
        ),
    ],
    ids=["syntax", "import", "act"],
)
def test_a_learner_that_raises_is_no_verdict(source, message, tmp_path, monkeypatch, capsys):
    (tmp_path / f"own_{len(source)}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["certify", f"own_{len(source)}:Own", "--family", "hypercube", "--seeds", "3"])
    assert ended.value.code == 2  # status 1 says "below a lower bound"
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bound", "--rounds", "1", "--d", "3"], "rounds must be >= 2, got 1"),
        (["bound", "--rounds", "5", "--level", "2", "--d", "3"], "sigma must lie in [0, 1], got"),
        (["bound", "--sigma", "missing.npy", "--d", "3"], "No such file"),
        (["bound", "--d", "3"], "one of the arguments --sigma --rounds is required"),
        (["simulate", "thompson"], "invalid choice: 'thompson'"),
        (["simulate", "oful", "--d", "0"], "d must be >= 1, got 0"),
        (["certify", "nothing"], "learner must be module:Class or one of"),
        (["certify", "no_such_module:C"], "learner 'no_such_module:C' cannot be imported"),
        (["certify", "json:Nothing"], "cannot be imported: no 'Nothing' in 'json'"),
        (["certify", "greedy", "--family", "cube"], "family must be one of"),
        (["certify", "greedy", "--json", "no_such_folder/found.json"], "--json must be a file in a folder"),
        (["simulate", "oful", "--save", "no_such_folder/runs.npz"], "save_to must be a file in a folder"),
        (["simulate", "oful", "--key", str(2**70)], "--key must be a number of 64 bits"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_wrong_input_ends_with_status_two_and_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
