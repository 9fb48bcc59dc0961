"""All packages' claims on one HTML page that stands alone: styles and figures inside, no script, no network.

    python -m tenfold_tools.report --reports reports --output reports/index.html

reads every `reports/*.json` that `python -m tenfold_tools.claims` wrote. The page shows what is stored and
judges nothing anew; what was measured on other sources than the package's latest run is marked as such.
"""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from tenfold_tools import claims_store as store
from tenfold_tools.claims import Verdict
from tenfold_tools.wording import duration, interval, joined, short

_MEANINGS = {
    Verdict.PASS: "every criterion holds on the whole 95 % interval",
    Verdict.FAIL: "at least one criterion is broken by the whole interval",
    Verdict.INCONCLUSIVE: "an interval straddles its threshold; more seeds or a larger scale may decide",
    Verdict.NOT_RUN: "needs hardware, data or a scale that this run did not have",
    Verdict.ERROR: "the experiment stopped with an exception",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code: 0, or 2 if there is nothing to show.

    Args:
        arguments: the command line without the program's name; default that of the process.
    """
    try:
        options = _parse(arguments)
        documents, notices = load(options.reports)
        for notice in notices:
            sys.stderr.write(f"tenfold report: {notice}; left out\n")
        store.write_text(options.output, render(documents))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"tenfold report: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(f"report: {options.output}\n")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m tenfold_tools.report",
        description="Make one HTML page of all stored claims.",
        allow_abbrev=False,
    )
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder of the JSON files")
    parser.add_argument("--output", type=Path, help="the page (default: index.html in that folder)")
    options = parser.parse_args(arguments)
    options.output = options.output or options.reports / "index.html"
    return options


def load(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The documents in a folder, by package, and a notice for each file that could not be used.

    Raises:
        ValueError: if there is no usable report.
    """
    documents, notices = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            documents.append(store.read(path))
        except store.Unreadable as error:
            notices.append(str(error))
    if not documents:
        found = f" ({'; '.join(notices)})" if notices else ""
        raise ValueError(
            f"--reports must be a folder with reports of `python -m tenfold_tools.claims`, "
            f"found none in {folder}{found}"
        )
    return sorted(documents, key=lambda document: document["package"]), notices


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page as text.

    Args:
        documents: as `load` gives them, at least one.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "measured": measured,
        "published": published,
        "duration": duration,
        "joined": joined,
        "minus": _with_minus,
        "data_uri": _data_uri,
        "slug": lambda verdict: str(verdict).lower(),
    }
    environment.globals["rerun"] = rerun
    environment.globals["configurations"] = configurations
    records = [record for document in documents for record in document["claims"]]
    return environment.get_template("report.html.j2").render(
        documents=documents,
        counts=_counts(records),
        counts_of=_counts,
        total=len(records),
        meanings=_MEANINGS,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found = Counter(record["verdict"] for record in records)
    return {str(verdict): found[verdict] for verdict in Verdict}


# ---------------------------------------------------------------------------------------------- wording


def measured(number: Mapping[str, Any]) -> tuple[str, str]:
    """Value and interval as text: ("0.074", "0.064 to 0.084"); the second is "" for an exact number."""
    value, low, high = number["value"], number["low"], number["high"]
    if value is None:
        return "not finite", ""
    if low is None or high is None:
        return _with_minus(short(value)), "no interval"
    shown, start, end = map(_with_minus, interval(value, low, high))
    return shown, "" if number["exact"] else f"{start} to {end}"


def published(number: Mapping[str, Any]) -> str:
    """What the paper reports: its text, its number to 4 digits, or nothing."""
    entry = number["published"]
    if entry is None or isinstance(entry, str):
        return entry or ""
    return _with_minus(short(entry))


def _with_minus(text: str) -> str:
    """Negative numbers get a minus sign, which is wider than a hyphen; exponents and ranges keep theirs."""
    return re.sub(r"(?<![\w.])-(?=[0-9.])", "\N{MINUS SIGN}", text)


def rerun(package: str, record: Mapping[str, Any]) -> str:
    """The command that measures this claim again in the same way."""
    command = ["uv", "run", "noxfile.py", "-s", "reproduce", "--", package]
    command += ["--claims", record["id"], "--scale", record["scale"]]
    if not record["own_seeds"]:
        command += ["--seeds", str(len(record["seeds"]))]
    if record["device"] != "cpu":
        command += ["--device", record["device"]]
    return shlex.join(command)


def configurations(record: Mapping[str, Any]) -> dict[str, Any]:
    """The configurations as what they share and a table of what differs.

    Returns:
        "shared": pairs (name, value); "columns": the names that differ; "rows": one list of texts per
        configuration, empty where a configuration does not have the name.
    """
    entries = record["configurations"]
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    first = entries[0] if entries else {}
    shared = [n for n in names if all(n in entry and entry[n] == first.get(n) for entry in entries)]
    columns = [name for name in names if name not in shared]
    return {
        "shared": [(name, _setting(first[name])) for name in shared],
        "columns": columns,
        "rows": [[_setting(entry[n]) if n in entry else "" for n in columns] for entry in entries],
    }


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"({', '.join(map(_setting, value))})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting(entry)}" for name, entry in value.items())
    return str(value)


def _data_uri(svg: str) -> str:
    """The figure as an image of its own: its ids cannot meet another figure's, and no script in it runs."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
