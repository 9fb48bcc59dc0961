"""The command behind `python -m tenfold_tools.claims`: finds the packages' claims and runs them.

Everything that can be wrong with the request (names, scale, device, a claims.py that does not load) is found
before the first claim runs and before anything is written: one line, exit 2. After every claim the results
are on disk, so an interrupted run goes on where it was. Exit 1 means a required FAIL or an ERROR.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from rich.console import Console

from tenfold_tools import claims_store as store
from tenfold_tools import workspace
from tenfold_tools.claims import SCALES, Claim, Run, Verdict
from tenfold_tools.claims_console import make_console, progress_for, verdict_table


class BadRequest(ValueError):  # noqa: N818  (what was asked)
    """The command cannot be carried out as asked; the message says what is accepted."""


@dataclass(frozen=True)
class Job:
    """One package's part of the command: all its claims, and those to run now."""

    package: workspace.Package
    claims: tuple[Claim, ...]
    selected: tuple[Claim, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: the command line without the program's name; default that of the process.
    """
    console = make_console()
    try:
        options = _parse(arguments)
        root = workspace.root()
        jobs = _plan(options, root)
    except ValueError as error:
        sys.stderr.write(f"tenfold claims: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before the first claim; nothing was written\n")
        return 130
    results: list[tuple[str, dict[str, Any]]] = []
    try:
        for job in jobs:
            name = job.package.distribution
            records = _run_job(job, options, root, console)
            console.print(verdict_table(f"{name} {job.package.version}", records))
            results += [(f"{name} {record['id']}", record) for record in records]
        return _conclude(results, console)
    except KeyboardInterrupt:
        again = " without --fresh" if options.fresh else ""
        sys.stderr.write(
            f"\ninterrupted; every finished claim is stored in {options.output}. "
            f"Run the same command again{again} to go on from there.\n"
        )
        return 130
    except OSError as error:  # one of ours: those of a claim are in its record
        sys.stderr.write(f"tenfold claims: --output {options.output} must be writable: {error}\n")
        return 2


# ---------------------------------------------------------------------------------------------- the request


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadRequest(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m tenfold_tools.claims",
        description="Run the claims of packages and store the verdicts.",
        allow_abbrev=False,
    )
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all that have claims")
    parser.add_argument("--scale", choices=SCALES, default="quick", help="how much to run (default quick)")
    parser.add_argument("--claims", nargs="+", metavar="ID", help="only these claims")
    parser.add_argument(
        "--seeds", type=_count, metavar="N", help="seeds per claim (default: the claim's own)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--fresh", action="store_true", help="run again what is stored")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder (default reports)")
    options = parser.parse_intermixed_args(arguments)
    if options.output.exists() and not options.output.is_dir():
        raise BadRequest(f"--output must be a folder or a new name, got the file {options.output}")
    _check_device(options.device)
    return options


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:[0-9]+)?", device):
        raise BadRequest(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    there = _cuda_devices()
    if int(device.partition(":")[2] or 0) >= there:
        raise BadRequest(f"--device {device} is not here ({there} CUDA devices are visible); accepted: cpu")


def _cuda_devices() -> int:
    """How many CUDA devices the installed framework sees; torch is asked first, then jax."""
    if importlib.util.find_spec("torch"):
        return importlib.import_module("torch").cuda.device_count()
    if importlib.util.find_spec("jax"):
        return sum(device.platform == "gpu" for device in importlib.import_module("jax").devices())
    return 0


def _plan(options: argparse.Namespace, root: Path) -> list[Job]:
    """Loads the claims of the chosen packages and selects among them.

    Raises:
        ValueError: for an unknown package or claim, or a claims.py that does not load.
    """
    with_claims = [p for p in workspace.packages(root) if _claims_file(p).is_file()]
    accepted = ", ".join(p.distribution for p in with_claims) or "none yet"
    chosen = [workspace.find(name, root) for name in dict.fromkeys(options.packages)] or with_claims
    for package in chosen:
        if package not in with_claims:
            raise BadRequest(f"{package.distribution} has no experiments/claims.py; accepted: {accepted}")
    if not chosen:
        raise BadRequest(f"no package of {root} has experiments/claims.py")
    loaded = {package: _load_claims(package, root) for package in dict.fromkeys(chosen)}
    wanted = set(options.claims or ())
    known = {claim.id for claims in loaded.values() for claim in claims}
    if not wanted <= known:
        ids = "; ".join(f"{p.distribution}: {', '.join(c.id for c in cs)}" for p, cs in loaded.items())
        raise BadRequest(f"unknown claim {', '.join(sorted(wanted - known))}; accepted: {ids}")
    jobs = [Job(p, cs, tuple(c for c in cs if not wanted or c.id in wanted)) for p, cs in loaded.items()]
    return [job for job in jobs if job.selected]


def _claims_file(package: workspace.Package) -> Path:
    return package.path / "experiments" / "claims.py"


def _load_claims(package: workspace.Package, root: Path) -> tuple[Claim, ...]:
    path = _claims_file(package)
    shown = path.relative_to(root).as_posix()
    try:
        module = load_experiments(path, f"tenfold_experiments_{package.import_name}")
    except (Exception, SystemExit) as error:
        raise BadRequest(
            f"{shown} must load: {_where(error, path)}{type(error).__name__}: {error}; "
            "accepted: a module that defines at least one @claim"
        ) from error
    claims = tuple({id(entry): entry for entry in vars(module).values() if isinstance(entry, Claim)}.values())
    if not claims:
        raise BadRequest(f"{shown} must define at least one @claim, found none")
    for what, names in (("ids", [claim.id for claim in claims]), ("functions", _function_names(path))):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise BadRequest(f"{what} in {shown} must be unique, found more than once: {', '.join(twice)}")
    return claims


def _function_names(path: Path) -> list[str]:
    """The file's functions: of two with the same name Python keeps the last, and a claim would be lost."""
    return [node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)]


def _where(error: BaseException, path: Path) -> str:
    """The line of claims.py where loading stopped."""
    if isinstance(error, SyntaxError):
        return ""  # its text has the line
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def load_experiments(path: Path, name: str) -> ModuleType:
    """Imports a file under a name of its own; its neighbours can be imported while it loads.

    The neighbours leave sys.modules afterwards: another package may have a neighbour of the same name.

    Args:
        path: the claims.py of a package, or a neighbour of it.
        name: what the module is called.

    Raises:
        ImportError: if it is no Python file.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for new in set(sys.modules) - before - {name}:
            file = getattr(sys.modules[new], "__file__", None)
            if file and path.parent in Path(file).parents:
                del sys.modules[new]
    return module


# ---------------------------------------------------------------------------------------------- the run


def _run_job(job: Job, options: argparse.Namespace, root: Path, console: Console) -> list[dict[str, Any]]:
    """Runs the selected claims of one package; returns their records in the order of the file."""
    path = options.output / f"{job.package.distribution}.json"
    head = store.describe_run(job.package, root, options.scale, options.device)
    stored = _stored(path, console)
    records = {claim.id: stored[claim.id] for claim in job.claims if claim.id in stored}
    if options.fresh:
        for claim in job.selected:
            records.pop(claim.id, None)
        _write(path, head, job, records)
    reused = []
    with progress_for(console, job.package.distribution, len(job.selected)) as progress:
        for claim in job.selected:
            seeds = claim.seeds_at(options.scale, options.seeds)
            if claim.id in records and store.reusable(records[claim.id], head, seeds):
                reused.append(claim.id)
                progress.skip()
                continue
            progress.begin(claim.id)
            run = Run(options.scale, seeds, options.device, progress.track)
            records[claim.id] = _run_claim(claim, run, head, root)
            _write(path, head, job, records)
            progress.end(records[claim.id])
    if reused:
        _write(path, head, job, records)  # the head says when the results were last confirmed, and where
        console.print(
            f"{job.package.distribution}: {len(reused)} of {len(job.selected)} reused ({', '.join(reused)}), "
            "because nothing they depend on has changed; --fresh runs them again",
            soft_wrap=True,
        )
    return [records[claim.id] for claim in job.selected]


def _conclude(results: list[tuple[str, dict[str, Any]]], console: Console) -> int:
    """Prints the counts; 1 on a required FAIL or an ERROR, else 0."""
    counts = Counter(record["verdict"] for _, record in results)
    console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]))
    broken = [
        name
        for name, record in results
        if record["verdict"] == Verdict.ERROR or (record["verdict"] == Verdict.FAIL and record["required"])
    ]
    if broken:
        console.print(f"failed (required FAIL or ERROR): {', '.join(broken)}", soft_wrap=True)
    return 1 if broken else 0


def _stored(path: Path, console: Console) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return {record["id"]: record for record in store.read(path)["claims"]}
    except store.Unreadable as error:
        console.print(f"{error}; kept as {store.set_aside(path).name}", soft_wrap=True)
        return {}


def _write(path: Path, head: dict[str, Any], job: Job, records: dict[str, dict[str, Any]]) -> None:
    store.write(path, head | {"claims": [records[c.id] for c in job.claims if c.id in records]})


def _run_claim(claim: Claim, run: Run, head: dict[str, Any], root: Path) -> dict[str, Any]:
    started = time.monotonic()
    try:
        outcome = claim(run)
        return store.record(claim, run, head, outcome, time.monotonic() - started, root)
    except (Exception, SystemExit) as error:
        return store.record(claim, run, head, error, time.monotonic() - started, root)
