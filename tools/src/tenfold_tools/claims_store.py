"""What a run of claims leaves on disk: `reports/<distribution>.json`, written after every claim.

A stored result stands for a run that need not be repeated, so it is reused only when everything that could
have changed its numbers is the same: scale, seeds, device, version, and the fingerprint, a hash of

- the package's src/ and experiments/,
- the workshop's modules that an experiment can call (statistics, data, workloads, ...),
- the version of Python and of the numerical libraries.

The fingerprint replaces the commit here on purpose: by the commit, an edited README would throw results away
and an uncommitted edit of the optimiser would keep them. The commit is recorded for the reader.

The JSON is strict: a value or a bound that is not finite is null.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from tenfold_tools.claims import Claim, Figure, Measurement, NotRun, Run, Verdict
from tenfold_tools.workspace import Package

SCHEMA = 1
"""Version of the file's layout; a file of another version is not read."""

LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch", "triton", "jax", "jaxlib", "flax", "optax")

# The workshop's modules that cannot change a measured number. Any other one, also a new one, counts.
_BYSTANDERS = {
    "claims_console.py",
    "claims_runner.py",
    "claims_store.py",
    "figures.py",
    "matrix.py",
    "release.py",
    "report.py",
    "wording.py",
    "workspace.py",
}

_DOCUMENT = {
    "package": str,
    "version": str,
    "commit": str | None,
    "modified": bool,
    "fingerprint": str,
    "environment": dict,
    "scale": str,
    "device": str,
    "claims": list,
}
_RECORD = {
    "id": str,
    "sentence": str,
    "source": str,
    "required": bool,
    "scale": str,
    "device": str,
    "seeds": list,
    "own_seeds": bool,
    "version": str,
    "commit": str | None,
    "modified": bool,
    "fingerprint": str,
    "date": str,
    "seconds": int | float,
    "verdict": str,
    "reason": str,
    "traceback": str,
    "numbers": list,
    "criteria": list,
    "configurations": list,
    "figures": list,
    "note": str,
}


class Unreadable(ValueError):  # noqa: N818  (what the file is)
    """A report that cannot be used, with the reason in one line."""


# ---------------------------------------------------------------------------------------------- the file


def read(path: Path) -> dict[str, Any]:
    """The document in a report file.

    Raises:
        Unreadable: if it is no JSON, has another schema version, or lacks a field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path.name} is not readable JSON ({error})") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise Unreadable(f"{path.name} has schema {schema!r}, this version reads {SCHEMA}")
    _check_fields(path, document, _DOCUMENT)
    for record in document["claims"]:
        _check_fields(path, record, _RECORD)
        if record["verdict"] not in set(Verdict):
            raise Unreadable(f"{path.name}: verdict of {record['id']} is {record['verdict']!r}")
    return document


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_fields(path: Path, entry: Any, fields: Mapping[str, Any]) -> None:
    for name, kind in fields.items():
        if not isinstance(entry, dict) or name not in entry or not isinstance(entry[name], kind):
            raise Unreadable(f"{path.name}: field {name!r} is missing or of the wrong type")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the document as strict JSON; a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: if a number is not finite (nothing is written then).
    """
    write_text(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside the file, then renames: an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Renames a file that cannot be used, so that nothing overwrites it; returns the new name."""
    number = 1
    while (target := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    return path.rename(target)


# ---------------------------------------------------------------------------------------------- circumstances


def describe_run(package: Package, root: Path, scale: str, device: str) -> dict[str, Any]:
    """The head of a document: package, commit, environment, scale; its list of claims is empty.

    Args:
        package: the package whose claims run.
        root: the workspace's root.
        scale: "quick", "laptop" or "full".
        device: "cpu", "cuda" or "cuda:N".
    """
    environment = _environment(device)
    commit = _git(root, "rev-parse", "HEAD")
    return {
        "schema": SCHEMA,
        "package": package.distribution,
        "version": package.version,
        "commit": commit,
        "modified": bool(_git(root, "status", "--porcelain")),
        "fingerprint": _fingerprint(package, environment),
        "environment": environment,
        "scale": scale,
        "device": device,
        "claims": [],
    }


def reusable(record: Mapping[str, Any], head: Mapping[str, Any], seeds: Sequence[int]) -> bool:
    """Whether a stored result stands for the run described by the head.

    An ERROR is run again: its cause may be gone. So is a NOT-RUN without numbers: it costs nothing to ask.
    """
    if record["verdict"] == Verdict.ERROR or (record["verdict"] == Verdict.NOT_RUN and not record["numbers"]):
        return False
    same = all(record[name] == head[name] for name in ("scale", "device", "version", "fingerprint"))
    return same and record["seeds"] == list(seeds)


def _fingerprint(package: Package, environment: Mapping[str, Any]) -> str:
    workshop = Path(__file__).parent
    files = [(f"tools/{path.name}", path) for path in workshop.glob("*.py") if path.name not in _BYSTANDERS]
    for folder in ("src", "experiments"):
        found = (package.path / folder).rglob("*")
        kept = [path for path in found if path.is_file() and path.suffix != ".pyc"]
        files += [(path.relative_to(package.path).as_posix(), path) for path in kept]
    digest = hashlib.sha256(json.dumps([environment["python"], environment["libraries"]]).encode())
    for name, path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _environment(device: str) -> dict[str, Any]:
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "libraries": libraries,
        "accelerator": _accelerator(device),
    }


def _accelerator(device: str) -> str | None:
    torch = sys.modules.get("torch")
    if device == "cpu" or torch is None or not torch.cuda.is_available():
        return None  # jax names its devices no better than `device` does
    return torch.cuda.get_device_name(device)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------- one claim


def record(
    claim: Claim,
    run: Run,
    head: Mapping[str, Any],
    outcome: Measurement | BaseException,
    seconds: float,
    root: Path,
) -> dict[str, Any]:
    """One claim's entry in the document.

    Args:
        claim: the claim that ran.
        run: its scale, seeds and device.
        head: the document's head (`describe_run`).
        outcome: the Measurement; NotRun gives NOT-RUN; any other exception ERROR with its traceback.
        seconds: how long it took.
        root: the workspace's root; paths in a traceback are shown from there.

    Raises:
        TypeError: if a configuration holds something that JSON cannot.
    """
    entry: dict[str, Any] = {
        "id": claim.id,
        "sentence": claim.sentence,
        "source": claim.source,
        "required": claim.required(run.scale),
        "required_from": claim.required_from,
        "scale": run.scale,
        "device": run.device,
        "seeds": list(run.seeds),
        "own_seeds": run.seeds == claim.seeds_at(run.scale),
        "version": head["version"],
        "commit": head["commit"],
        "modified": head["modified"],
        "fingerprint": head["fingerprint"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "verdict": str(Verdict.ERROR),
        "reason": "",
        "traceback": "",
        "numbers": [],
        "criteria": [],
        "configurations": [],
        "figures": [],
        "note": "",
    }
    if isinstance(outcome, Measurement):
        entry |= {"verdict": str(outcome.verdict)} | _measured(outcome)
    elif isinstance(outcome, NotRun):
        entry |= {"verdict": str(Verdict.NOT_RUN), "reason": outcome.reason}
        entry |= _measured(outcome.measurement) if outcome.measurement is not None else {}
    else:
        entry["reason"] = traceback.format_exception_only(outcome)[-1].strip()
        entry["traceback"] = _traceback(outcome, root)
    return entry


def _measured(measurement: Measurement) -> dict[str, Any]:
    return {
        "numbers": [
            {
                "name": number.name,
                "value": _plain(number.value),
                "low": _plain(number.low),
                "high": _plain(number.high),
                "exact": number.low == number.high,
                "unit": number.unit,
                "published": _plain(number.published),
            }
            for number in measurement.numbers
        ],
        "criteria": [{"text": c.text, "verdict": str(c.verdict)} for c in measurement.criteria],
        "configurations": _plain(list(measurement.configurations), "configurations"),
        "figures": [_rendered(figure) for figure in measurement.figures],
        "note": measurement.note,
    }


def _rendered(figure: Figure) -> dict[str, str]:
    from tenfold_tools.figures import render  # matplotlib behind it: loaded when there is a figure to store

    return render(figure)


def _plain(value: Any, where: str = "value") -> Any:
    """The value in JSON's own types: an array becomes a list, a float that is not finite null."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    kind = type(value).__name__
    raise TypeError(f"{where} must be None, a bool, number, string, list, mapping or array, got {kind}")


def _traceback(error: BaseException, root: Path) -> str:
    """The traceback from the experiment's own frame on, with paths relative to the workspace."""
    harness = {str(Path(__file__).with_name(name)) for name in ("claims.py", "claims_runner.py")}
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in harness:
        frame = frame.tb_next
    lines = traceback.format_exception(type(error), error, frame or error.__traceback__)
    return "".join(lines).replace(f"{root}{os.sep}", "")
