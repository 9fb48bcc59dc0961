"""Figures: the same bytes on every run, in two styles, whatever the user's matplotlib is set to."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl

from tenfold_tools.claims import Figure
from tenfold_tools.figures import render


def draw(canvas) -> None:
    axes = canvas.subplots()
    axes.plot([1, 2, 3], [1, 4, 9], label="square")
    axes.legend()


def test_a_figure_renders_to_the_same_bytes_twice():
    assert render(Figure("Squares", draw)) == render(Figure("Squares", draw))


def test_light_and_dark_are_wellformed_and_differ_in_their_colours():
    pictures = render(Figure("Squares", draw))
    assert pictures["title"] == "Squares"
    for style in ("light", "dark"):
        assert ElementTree.fromstring(pictures[style]).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
    assert "#1d5fc4" in pictures["light"]
    assert "#1d5fc4" not in pictures["dark"]


def test_the_background_is_transparent():
    for style, picture in render(Figure("Empty", lambda _canvas: None)).items():
        assert style == "title" or "fill: #" not in picture


def test_settings_of_the_user_neither_change_the_figure_nor_are_changed():
    expected = render(Figure("Squares", draw))
    with mpl.rc_context({"lines.linewidth": 9.0, "svg.hashsalt": None}):
        before = dict(mpl.rcParams)
        assert render(Figure("Squares", draw)) == expected
        assert dict(mpl.rcParams) == before
