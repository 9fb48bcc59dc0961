"""What the claims command shows, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tenfold_tools import claims_console
from tenfold_tools.claims import Verdict
from tenfold_tools.claims_console import PIPED_WIDTH, make_console, progress_for, verdict_table


def record(**changes):
    entry = {"id": "R1", "verdict": "PASS", "required": True, "seconds": 1.25, "sentence": "It works."}
    return entry | {"criteria": [], "reason": ""} | changes


def on(*, terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_cuts_nothing_off(width):
    words = [f"word{n}" for n in range(60)]
    criterion = {"text": f"{'x' * 150}: 0.1 [0.05, 0.2] < 0.4", "verdict": "INCONCLUSIVE"}
    console = on(terminal=False, width=width)
    console.print(
        verdict_table("alpha", [record(sentence=" ".join(words), criteria=[criterion], id="long-identifier")])
    )
    text = shown(console)
    assert all(word in text.split() for word in words)
    assert text.count("x") == 150
    assert "[0.05, 0.2]" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_every_verdict_has_its_row():
    console = on(terminal=False)
    console.print(verdict_table("alpha", [record(verdict=str(verdict)) for verdict in Verdict]))
    assert [verdict for verdict in Verdict if verdict not in shown(console)] == []


def test_a_sentence_is_printed_as_it_is():
    console = on(terminal=False)
    console.print(verdict_table("alpha", [record(sentence="[bold]x[/bold] :smile: [0, 1]")]))
    assert "[bold]x[/bold] :smile: [0, 1]" in shown(console)


def test_a_pipe_gets_a_wide_table_unless_columns_says_otherwise(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert make_console().width == PIPED_WIDTH
    monkeypatch.setenv("COLUMNS", "77")
    assert make_console().width == 77


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("iterable", [range(3), iter(range(3))], ids=["sized", "unsized"])
def test_tracking_hands_out_every_item_and_tells_the_outcome(terminal, iterable):
    console = on(terminal=terminal)
    with progress_for(console, "alpha", 2) as progress:
        progress.skip()
        progress.begin("R2")
        items = list(
            progress.track(list(iterable) if isinstance(iterable, range) else iter(range(3)), "seeds")
        )
        progress.end(record(id="R2", verdict="FAIL"))
    assert items == [0, 1, 2]
    assert "alpha R2: FAIL in 1.2 s" in shown(console)


def test_bars_show_the_claim_and_the_loop_inside():
    console = on(terminal=True)
    with progress_for(console, "alpha", 2) as progress:
        progress.begin("R2")
        for _ in progress.track(range(4), "seeds"):
            progress.progress.refresh()  # pyright: ignore[reportAttributeAccessIssue]
    assert "alpha R2" in shown(console)
    assert "seeds" in shown(console)
    assert "3/4" in shown(console)


def test_a_log_gets_a_line_about_a_long_loop_only_now_and_then(monkeypatch):
    clock = iter([0.0, *(4.0 * n for n in range(1, 20) for _ in range(2))])
    monkeypatch.setattr(claims_console.time, "monotonic", lambda: next(clock))
    console = on(terminal=False)
    with progress_for(console, "alpha", 1) as progress:
        for _ in progress.track(range(6), "seeds"):
            pass
    lines = shown(console).splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("  seeds: ")
    assert lines[0].endswith(" of 6")
