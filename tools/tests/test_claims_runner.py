"""The claims command in a small workspace: what it runs and reuses, and what an interruption leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from claims_tree import add_package, make_workspace, passing, ran, results, set_version

from tenfold_tools import claims_runner
from tenfold_tools.claims_runner import main

FAILING = """
@claim("bad", sentence="It fails.", source="Table 1", required_from={required_from!r})
def bad(run):
    return Measurement([Number("x", 3.0)], [below(Number("x", 3.0), 2)])
"""
INTERRUPTED = """
@claim("{id}", sentence="It takes long.", source="Table 2")
def interrupted(run):
    if not Path("go").exists():
        raise KeyboardInterrupt
    return Measurement([], [below(Number("x", 1.0), 2)])
"""


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty workspace, which is also the current folder."""
    folder = make_workspace(tmp_path / "house")
    monkeypatch.chdir(folder)
    for name in (
        "FORCE_COLOR",
        "TTY_COMPATIBLE",
        "COLUMNS",
    ):  # make a pipe look like a terminal of some width
        monkeypatch.delenv(name, raising=False)
    return folder


def verdicts(package: str = "alpha") -> dict[str, str]:
    records = results(Path("reports") / f"{package}.json")
    return {name: record["verdict"] for name, record in records.items()}


# ------------------------------------------------------------------------------------------- what it runs


def test_all_packages_with_claims_run_in_the_order_of_their_files(root):
    add_package(root, "beta", passing("z", "a", "m"))
    add_package(root, "alpha", passing("one"))
    add_package(root, "without", None)
    assert main([]) == 0
    assert ran(root) == ["one", "z", "a", "m"]
    assert list(verdicts("beta")) == ["z", "a", "m"]
    assert sorted(path.name for path in Path("reports").iterdir()) == ["alpha.json", "beta.json"]


def test_a_named_package_runs_alone_wherever_the_options_stand(root):
    add_package(root, "alpha", passing("one"))
    add_package(root, "beta", passing("two"))
    assert main(["--scale", "laptop", "beta", "--output", "elsewhere"]) == 0
    assert ran(root) == ["two"]
    assert results(Path("elsewhere/beta.json"))["two"]["scale"] == "laptop"


def test_packages_may_have_neighbour_modules_of_the_same_name(root):
    uses_neighbour = """
    from neighbour import WORTH
    @claim("worth", sentence="It is worth it.", source="Table 1")
    def worth(run):
        return Measurement([Number("worth", WORTH)], [])
    """
    for package, worth in (("alpha", 1), ("beta", 2)):
        folder = add_package(root, package, uses_neighbour)
        (folder / "experiments" / "neighbour.py").write_text(f"WORTH = {worth}\n")
    path_before = list(sys.path)
    assert main([]) == 0
    for package, worth in (("alpha", 1), ("beta", 2)):
        assert results(Path(f"reports/{package}.json"))["worth"]["numbers"][0]["value"] == worth
    assert sys.path == path_before


def test_the_claim_sees_its_scale_seeds_and_device(root, monkeypatch):
    monkeypatch.setattr(claims_runner, "_cuda_devices", lambda: 2)
    claims = """
    COUNTS = {"quick": 2, "laptop": 4, "full": 8}
    @claim("seen", sentence="It sees.", source="Table 1", seeds=COUNTS, first_seed=5)
    def seen(run):
        seeds = list(run.track(run.seeds, "seeds"))
        seen = {"scale": run.scale, "seeds": seeds, "device": run.device}
        return Measurement([], [], configurations=[seen])
    """
    add_package(root, "alpha", claims)
    assert main(["--scale", "laptop", "--seeds", "3", "--device", "cuda:1"]) == 0
    record = results(Path("reports/alpha.json"))["seen"]
    assert record["configurations"] == [{"scale": "laptop", "seeds": [5, 6, 7], "device": "cuda:1"}]
    assert record["seeds"] == [5, 6, 7]
    assert not record["own_seeds"]


def test_a_claim_that_raises_is_an_error_with_its_traceback_and_the_others_go_on(root, capsys):
    broken = """
    @claim("broken", sentence="It breaks.", source="Table 1")
    def broken(run):
        raise RuntimeError("the matrix is singular")
    @claim("leaves", sentence="It leaves.", source="Table 1")
    def leaves(run):
        raise SystemExit(3)
    @claim("drawn", sentence="It draws.", source="Table 1")
    def drawn(run):
        return Measurement([], [], figures=[Figure("none", lambda canvas: canvas.nothing())])
    @claim("kept", sentence="It keeps a set.", source="Table 1")
    def kept(run):
        return Measurement([], [], configurations=[{"members": {1, 2}}])
    """
    add_package(root, "alpha", broken + passing("after").replace("\n", "\n    "))
    assert main([]) == 1
    assert verdicts() == dict.fromkeys(("broken", "leaves", "drawn", "kept"), "ERROR") | {"after": "PASS"}
    records = results(Path("reports/alpha.json"))
    assert records["broken"]["reason"] == "RuntimeError: the matrix is singular"
    lines = records["broken"]["traceback"].splitlines()
    assert lines[1].startswith('  File "packages/alpha/experiments/claims.py", line ')
    assert "configurations[0]['members'] must be" in records["kept"]["reason"]
    assert "alpha broken" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("required_from", "scale", "code"),
    [("quick", "quick", 1), ("laptop", "quick", 0), ("laptop", "full", 1), (None, "full", 0)],
)
def test_only_a_required_fail_fails_the_command(root, required_from, scale, code):
    add_package(root, "alpha", FAILING.format(required_from=required_from))
    assert main(["--scale", scale]) == code
    assert verdicts() == {"bad": "FAIL"}


def test_inconclusive_and_not_run_do_not_fail_the_command(root):
    claims = """
    @claim("open", sentence="It is open.", source="Table 1", required_from="quick")
    def open_(run):
        number = Number.mean("x", [1.0, 2.0])
        return Measurement([number], [below(number, 3)])
    @claim("absent", sentence="It needs a GPU.", source="Table 1", required_from="quick")
    def absent(run):
        raise NotRun("needs a GPU", Measurement([Number("x", 1)], [below(Number("x", 1), 2)]))
    """
    add_package(root, "alpha", claims)
    assert main([]) == 0
    assert verdicts() == {"open": "INCONCLUSIVE", "absent": "NOT-RUN"}
    absent = results(Path("reports/alpha.json"))["absent"]
    assert absent["reason"] == "needs a GPU"
    assert absent["numbers"][0]["value"] == 1
    assert absent["criteria"][0]["verdict"] == "PASS"


# ------------------------------------------------------------------------------------------- what it reuses


def test_what_is_stored_is_reused_and_the_output_says_so(root, capsys):
    add_package(root, "alpha", passing("one", "two"))
    assert main([]) == 0
    before = results(Path("reports/alpha.json"))
    assert main([]) == 0
    assert ran(root) == ["one", "two"]
    assert results(Path("reports/alpha.json")) == before
    assert "2 of 2 reused (one, two)" in capsys.readouterr().out


def test_a_reused_required_fail_still_fails_the_command(root):
    add_package(root, "alpha", FAILING.format(required_from="quick"))
    assert [main([]), main([])] == [1, 1]


def _edit_source(folder: Path) -> None:
    (folder / "src" / "alpha" / "new.py").write_text("X = 1\n")


def _edit_neighbour(folder: Path) -> None:
    (folder / "experiments" / "neighbour.py").write_text("X = 1\n")


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (_edit_source, []),
        (_edit_neighbour, []),
        (lambda folder: set_version(folder, "0.2.0"), []),
        (lambda _folder: None, ["--scale", "laptop"]),
        (lambda _folder: None, ["--seeds", "7"]),
        (lambda _folder: None, ["--fresh"]),
    ],
    ids=["source", "experiments", "version", "scale", "seeds", "fresh"],
)
def test_what_the_result_depends_on_makes_it_run_again(root, change, options):
    counted = passing("one").replace('"Table 1"', '"Table 1", seeds=dict.fromkeys(SCALES, 3)')
    folder = add_package(root, "alpha", counted)
    main([])
    change(folder)
    main(options)
    assert ran(root) == ["one", "one"]


def test_what_the_result_does_not_depend_on_leaves_it_alone(root):
    folder = add_package(root, "alpha", passing("one"))
    main([])
    (folder / "README.md").write_text("Rewritten.\n")
    cache = folder / "src" / "alpha" / "__pycache__"
    cache.mkdir()
    (cache / "alpha.pyc").write_bytes(b"compiled")
    main([])
    assert ran(root) == ["one"]


def test_errors_and_bare_refusals_are_asked_again(root):
    claims = """
    @claim("broken", sentence="It breaks.", source="Table 1")
    def broken(run):
        if not Path("go").exists():
            raise RuntimeError("no")
        return Measurement([], [below(Number("x", 1), 2)])
    @claim("absent", sentence="It needs a file.", source="Table 1")
    def absent(run):
        if not Path("go").exists():
            raise NotRun("needs a file")
        return Measurement([], [below(Number("x", 1), 2)])
    """
    add_package(root, "alpha", claims)
    assert main([]) == 1
    Path("go").touch()
    assert main([]) == 0
    assert verdicts() == {"broken": "PASS", "absent": "PASS"}


def test_a_subset_leaves_the_other_results_in_place(root):
    add_package(root, "alpha", passing("one", "two", "three"))
    main([])
    before = results(Path("reports/alpha.json"))
    assert main(["--claims", "two", "--scale", "full"]) == 0
    after = results(Path("reports/alpha.json"))
    assert ran(root) == ["one", "two", "three", "two"]
    assert list(after) == ["one", "two", "three"]
    assert (after["one"], after["three"]) == (before["one"], before["three"])
    assert after["two"]["scale"] == "full"


def test_a_fresh_subset_forgets_only_its_own_results(root):
    add_package(root, "alpha", passing("one", "two"))
    main([])
    main(["--fresh", "--claims", "one"])
    main([])
    assert ran(root) == ["one", "two", "one"]


def test_a_claim_that_no_longer_exists_leaves_the_report(root):
    add_package(root, "alpha", passing("one", "two"))
    main([])
    add_package(root, "alpha", passing("two"))
    main([])
    assert list(verdicts()) == ["two"]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        '{"schema": 0, "claims": []}',
        "[]",
        '{"schema": 1, "claims": 3}',
        '{"schema": 1, "x": NaN}',
    ],
)
def test_a_report_that_cannot_be_read_is_set_aside_in_one_line(root, capsys, content):
    add_package(root, "alpha", passing("one"))
    Path("reports").mkdir()
    Path("reports/alpha.json").write_text(content)
    assert main([]) == 0
    assert verdicts() == {"one": "PASS"}
    assert Path("reports/alpha.json.set-aside-1").read_text() == content
    notices = [line for line in capsys.readouterr().out.splitlines() if "set-aside" in line]
    assert len(notices) == 1


# ---------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_run_keeps_what_is_done_and_goes_on_from_there(root, capsys):
    add_package(root, "alpha", passing("one") + INTERRUPTED.format(id="long") + passing("last"))
    assert main([]) == 130
    assert verdicts() == {"one": "PASS"}
    assert "Run the same command again to go on" in capsys.readouterr().err
    Path("go").touch()
    assert main([]) == 0
    assert ran(root) == ["one", "last"]
    assert verdicts() == {"one": "PASS", "long": "PASS", "last": "PASS"}


def test_an_interrupted_fresh_run_does_not_come_back_to_the_old_results(root):
    add_package(root, "alpha", INTERRUPTED.format(id="long") + passing("one"))
    Path("go").touch()
    assert main([]) == 0
    Path("go").unlink()
    assert main(["--fresh"]) == 130
    assert verdicts() == {}
    Path("go").touch()
    assert main([]) == 0
    assert ran(root) == ["one", "one"]


def test_ctrl_c_in_the_running_process_exits_130_and_the_next_run_resumes(root):
    waiting = """
    @claim("long", sentence="It takes long.", source="Table 2")
    def long(run):
        import time
        Path("started").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return Measurement([], [below(Number("x", 1.0), 2)])
    """
    add_package(root, "alpha", passing("one").replace("\n", "\n    ") + waiting)
    # A test runner in the background ignores SIGINT and its children inherit that; a user's shell does not.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('tenfold_tools.claims', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not Path("started").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the second claim did not start"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "alpha one: PASS" in output
    assert errors.strip().splitlines() == [
        "interrupted; every finished claim is stored in reports. "
        "Run the same command again to go on from there."
    ]
    assert verdicts() == {"one": "PASS"}
    assert [path.name for path in Path("reports").iterdir()] == ["alpha.json"]
    Path("go").touch()
    resumed = subprocess.run(
        [sys.executable, "-m", "tenfold_tools.claims"], capture_output=True, text=True, check=True
    )
    assert "1 of 2 reused (one)" in resumed.stdout
    assert ran(root) == ["one"]
    assert verdicts() == {"one": "PASS", "long": "PASS"}


# ------------------------------------------------------------------------------------------- what it records


def test_the_report_names_package_commit_and_environment(root):
    add_package(root, "alpha", passing("one"), version="1.2.3")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    (root / ".git" / "info" / "exclude").write_text("reports\nran\n__pycache__\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    main([])
    document = json.loads(Path("reports/alpha.json").read_text())
    assert (document["package"], document["version"]) == ("alpha", "1.2.3")
    assert (document["commit"], document["modified"]) == (commit.strip(), False)
    assert document["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["environment"]["cpus"] >= 1
    assert "numpy" in document["environment"]["libraries"]
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "# edited\n")
    main([])
    assert json.loads(Path("reports/alpha.json").read_text())["modified"] is True
