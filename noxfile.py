#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.11.12", "packaging>=24.1"]
# ///
"""Every automation of the monorepo in a few lines: `uv run noxfile.py -s SESSION`; logic lives in tools/."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "src"))

from tenfold_tools import workspace  # noqa: E402

PYTHONS = workspace.PYTHONS
PACKAGES = [package.name for package in workspace.packages(ROOT)]
TARGETS = [*PACKAGES, workspace.TOOLS]
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
DEFAULT_PYTHON = RUNNING if RUNNING in PYTHONS else PYTHONS[-1]
CONSTRAINTS = ("-c", "constraints.txt")
LINTERS = ("basedpyright", "check-jsonschema", "import-linter", "pdoc", "ruff", "zizmor")

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests"]


def offer_pyenv_interpreters() -> None:
    """Let pyenv's shims answer for every supported Python; by default they answer for one version only."""
    if shutil.which("pyenv") is None:
        return
    listing = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False)
    installed = listing.stdout.split()
    newest = [[v for v in installed if v.startswith(f"{python}.")][-1:] for python in PYTHONS]
    # A uv that pyenv started has the variable set to its own version: that one stays first.
    chosen = [os.environ.get("PYENV_VERSION", ""), *(version for found in newest for version in found)]
    os.environ["PYENV_VERSION"] = ":".join(version for version in chosen if version)


offer_pyenv_interpreters()
# Tests and experiments start many processes; without bytecode each would compile torch's sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def install(session: nox.Session, target: str, *options: str) -> None:
    """Install one package, editable, with all its extras, its test dependencies and the workshop."""
    folder = workspace.folder(target, ROOT).relative_to(ROOT)
    extras = ",".join(workspace.extras(folder))
    workshop = () if target == workspace.TOOLS else ("-e", "tools")
    session.install(
        *options, "-e", f"{folder}[{extras}]", *workshop, "--group", f"{folder}/pyproject.toml:test"
    )


def peers(target: str) -> tuple[str, ...]:
    """Options that install what the benchmarks of a package compare it with, where it names such packages."""
    manifest = workspace.folder(target, ROOT) / "pyproject.toml"
    declared = nox.project.load_toml(manifest).get("dependency-groups", {})
    return ("--group", f"{manifest.relative_to(ROOT)}:bench") if "bench" in declared else ()


def tool(session: nox.Session, module: str, *args: str, **kwargs: object) -> None:
    """Run a workshop command; its exit status 2 (bad input) becomes that of nox, which else ends with 1."""
    try:
        session.run("python", "-m", f"tenfold_tools.{module}", *args, **kwargs)
    except nox.command.CommandFailed as failure:
        if failure.return_code == 2:
            raise SystemExit(2) from None
        raise


def package_argument(session: nox.Session) -> tuple[str, list[str]]:
    """Split `-- PACKAGE OPTIONS` or say on one line which packages there are."""
    name, *options = session.posargs or [""]
    try:
        return workspace.find(name, ROOT).distribution, options
    except workspace.UnknownPackage as error:
        print(f"{session.name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_tests(session: nox.Session, target: str) -> None:
    """Run the tests of one target in two processes, without the slow ones unless `-m` is given."""
    marker = () if "-m" in session.posargs else ("-m", "not slow")
    workers = () if "-n" in session.posargs else ("-n", "2", "--dist", "worksteal")
    tests = workspace.folder(target, ROOT).relative_to(ROOT) / "tests"
    # One thread per process: two processes that each use all cores wait for one another.
    threads = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", str(tests), *workers, *marker, *session.posargs, env=threads)


def for_every_python(work: Callable[[nox.Session, str], None]) -> None:
    """One session name per Python: plain `-s tests` means one environment per package and not three."""
    for python in PYTHONS:
        name = work.__name__ if python == DEFAULT_PYTHON else f"{work.__name__}-{python}"

        @nox.session(python=python, name=name)
        @nox.parametrize("target", TARGETS, ids=TARGETS)
        @functools.wraps(work)
        def run(session: nox.Session, target: str) -> None:
            work(session, target)


@for_every_python
def tests(session: nox.Session, target: str) -> None:
    """Tests of one target at the versions of constraints.txt; `tests-3.13(...)` picks another Python."""
    install(session, target, *CONSTRAINTS)
    run_tests(session, target)


@for_every_python
def lowest(session: nox.Session, target: str) -> None:
    """The same tests at the lowest versions that the package declares."""
    install(session, target, "--resolution", "lowest-direct")
    run_tests(session, target)


@nox.session(venv_backend="none")
def reproduce(session: nox.Session) -> None:
    """The main job: claims of the named packages (default: all), then reports/index.html."""
    chosen = [argument for argument in session.posargs if argument in PACKAGES] or PACKAGES
    options = [argument for argument in session.posargs if argument not in PACKAGES]
    if options and not options[0].startswith("-"):
        package_argument(session)
    for package in chosen:
        session.notify(f"claims({package})", posargs=[package, *options])
    session.notify("report", posargs=[])


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def claims(session: nox.Session, package: str) -> None:
    """Claims of one package; `reproduce` queues this with its options."""
    install(session, package, *CONSTRAINTS)
    tool(session, "claims", *(session.posargs or [package]))


@nox.session
def report(session: nox.Session) -> None:
    """One HTML page of all claims in reports/."""
    session.install(*CONSTRAINTS, "-e", "tools")
    tool(session, "report", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks of one package: `-s bench -- PACKAGE [NAME] OPTIONS`, NAME for bench_NAME.py alone."""
    package, options = package_argument(session)
    name = options.pop(0) if options and not options[0].startswith("-") else "*"
    install(session, package, *CONSTRAINTS, *peers(package))
    scripts = sorted(workspace.folder(package, ROOT).glob(f"benchmarks/bench_{name}.py"))
    for script in scripts or session.error(f"{package} has no benchmarks/bench_{name}.py"):
        session.run("python", str(script.relative_to(ROOT)), *options)


@nox.session
def gpu(session: nox.Session) -> None:
    """GPU tests and benchmarks of one package on this machine's device: `-s gpu -- PACKAGE OPTIONS`."""
    package, options = package_argument(session)
    install(session, package, *CONSTRAINTS, *peers(package))
    # 5 is pytest's word for "no test carries the marker": a package without GPU code.
    session.run(
        "python", "-m", "pytest", f"packages/{package}/tests", "-m", "gpu", *options, success_codes=[0, 5]
    )
    for script in sorted(workspace.folder(package, ROOT).glob("benchmarks/bench_*.py")):
        session.run("python", str(script.relative_to(ROOT)), "--device", "cuda")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, independence of the packages, and the workflows."""
    session.install(*CONSTRAINTS, *LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = os.pathsep.join(str(workspace.folder(target, ROOT) / "src") for target in TARGETS)
    session.run("lint-imports", env={"PYTHONPATH": sources})
    session.run("zizmor", "--offline", "--quiet", ".github")
    workflows = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(".github/workflows/*.yml"))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")


@nox.session
@nox.parametrize("target", TARGETS, ids=TARGETS)
def types(session: nox.Session, target: str) -> None:
    """Type check of one target against exactly what it may import."""
    install(session, target, *CONSTRAINTS)
    session.install(*CONSTRAINTS, "basedpyright")
    # Named, because an environment of the checkout (.venv) would else be taken for the session's.
    interpreter = str(Path(session.bin) / "python")
    source = workspace.folder(target, ROOT).relative_to(ROOT) / "src"
    session.run("basedpyright", "--pythonpath", interpreter, str(source))


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def build(session: nox.Session, package: str) -> None:
    """Sdist and wheel; the wheel alone is imported in an empty environment, then tested in a fresh one."""
    session.install(*CONSTRAINTS, "-e", "tools")
    dist = session.create_tmp()
    tool(session, "release", "build", package, "--output", dist)
    tool(session, "release", "test", package, "--dist", dist)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def docs(session: nox.Session, package: str) -> None:
    """API reference of one package as HTML in dist/docs/PACKAGE."""
    install(session, package, *CONSTRAINTS)
    session.install(*CONSTRAINTS, "pdoc")
    session.run("pdoc", "-o", f"dist/docs/{package}", workspace.find(package, ROOT).import_name)


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """The CI matrix as JSON: `-s matrix -- --since REVISION`."""
    tool(session, "matrix", *session.posargs, env={"PYTHONPATH": str(ROOT / "tools" / "src")})


@nox.session
def release(session: nox.Session) -> None:
    """Rehearse a release up to the upload: `-s release -- PACKAGE`."""
    package, options = package_argument(session)
    session.install(*CONSTRAINTS, "-e", "tools")
    tool(session, "release", "rehearse", package, *options)


@nox.session(venv_backend="none")
def constraints(session: nox.Session) -> None:
    """Resolve constraints.txt anew for every supported Python and platform."""
    folders = [workspace.folder(target, ROOT).relative_to(ROOT) for target in TARGETS]
    groups = [argument for folder in folders for argument in ("--group", f"{folder}/pyproject.toml:test")]
    linters = Path(session.create_tmp()) / "linters.in"
    linters.write_text("\n".join(LINTERS))
    session.run(
        *("uv", "pip", "compile", "--universal", "--python-version", PYTHONS[0], "--upgrade", "--all-extras"),
        *("--no-annotate", "--custom-compile-command", "uv run noxfile.py -s constraints"),
        *("--output-file", "constraints.txt", *groups, str(linters)),
        *(f"{folder}/pyproject.toml" for folder in folders),
        external=True,
    )


if __name__ == "__main__":
    nox.main()
