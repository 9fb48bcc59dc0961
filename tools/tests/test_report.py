"""The report: one page that stands alone, shows everything that is stored, and trusts none of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from claims_tree import add_package, make_workspace

from tenfold_tools import claims_runner, report

EVERY_VERDICT = """
COUNTS = {"quick": 4, "laptop": 8, "full": 9}

def draw(canvas):
    canvas.subplots().plot([1, 2, 3])

@claim("passes", sentence="It passes.", source="Theorem 1", required_from="quick", seeds=COUNTS,
       first_seed=100)
def passes(run):
    ratio = Number.mean("ratio", [0.070, 0.072, 0.074, 0.076], unit="nats", published=-0.25)
    runs = [{"lr": lr, "steps": 450} for lr in (0.01, 0.02)]
    return Measurement([ratio], [below(ratio, 0.4)], runs, [Figure("The curve", draw)], note="Mind the gap.")

@claim("fails", sentence="It fails.", source="Table 2")
def fails(run):
    return Measurement([Number("x", 3.0)], [below(Number("x", 3.0), 2)])

@claim("open", sentence="It is open.", source="Figure 3")
def open_(run):
    number = Number.mean("loss", [1.0, 2.0])
    return Measurement([number], [below(number, 3)])

@claim("absent", sentence="It is absent.", source="Table 4")
def absent(run):
    raise NotRun("needs a <GPU>")

@claim("breaks", sentence="<script>alert(1)</script> & 'so' \\"on\\"", source="<b>Table 5</b>")
def breaks(run):
    raise RuntimeError("<img src=x onerror=alert(1)>")
"""


class Page(HTMLParser):
    """The page's tags with their attributes, its ids, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "source", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A workspace with two packages whose claims have run."""
    root = make_workspace(tmp_path_factory.mktemp("house"))
    add_package(root, "alpha", EVERY_VERDICT)
    add_package(root, "beta", EVERY_VERDICT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert claims_runner.main([]) == 1
        assert claims_runner.main(["beta", "--claims", "passes", "--scale", "laptop", "--seeds", "5"]) == 0
        assert claims_runner.main(["beta", "--claims", "fails"]) == 0
    return root


@pytest.fixture(scope="module")
def html(folder) -> str:
    target = folder / "page.html"
    assert report.main(["--reports", str(folder / "reports"), "--output", str(target)]) == 0
    return target.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def article(html: str, anchor: str) -> str:
    """The text of one claim's article."""
    block = html.split(f'<article id="{anchor}">')[1].split("</article>")[0]
    return Page(block).text


def test_the_tags_are_balanced_and_the_ids_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_every_link_of_the_page_leads_to_a_place_on_it(page):
    targets = [a["href"] for tag, a in page.tags if tag in ("a", "use")]
    assert len(targets) > 20
    assert {target.removeprefix("#") for target in targets} <= set(page.ids)


def test_nothing_is_loaded_and_nothing_runs(html, page):
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "action", "data", "poster"):
                assert value.startswith(("#", "data:")), (name, value)
    assert {"script", "iframe", "object", "embed", "base"}.isdisjoint(tag for tag, _ in page.tags)
    style = html.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|http", style)


def test_stored_text_is_shown_as_text(html, page):
    assert "<script>alert(1)</script> & 'so' \"on\"" in page.text
    assert "RuntimeError: <img src=x onerror=alert(1)>" in page.text
    assert "<b>Table 5</b>" in page.text
    assert "<script" not in html
    assert "<img src=x" not in html


def test_the_summary_counts_every_verdict(html):
    summary = html.split('<ul class="counts">')[1].split("</ul>")[0]
    counts = re.findall(r'class="count">(\d+)<', summary)
    assert counts == ["2", "2", "2", "2", "2"]
    assert "10 claims of 2 packages" in Page(html).text


def test_a_claim_shows_all_that_was_measured(html):
    text = article(html, "alpha-passes")
    for part in ("PASS", "required", "It passes.", "Theorem 1", "ratio", "0.0730 nats", "0.0689 to 0.0771"):
        assert part in text
    for part in (
        "\N{MINUS SIGN}0.25",
        "< 0.4",
        "The curve",
        "Mind the gap.",
        "2 configurations",
        "lr 0.01 0.02",
    ):
        assert part in text
    assert "steps 450" in text
    assert "with seeds 100 to 103" in text
    assert "uv run noxfile.py -s reproduce -- alpha --claims passes --scale quick" in text


def test_the_other_verdicts_give_their_reason(html):
    assert "Not run: needs a <GPU>" in article(html, "alpha-absent")
    assert "no interval" in article(html, "alpha-open")
    broken = article(html, "alpha-breaks")
    assert "Traceback" in broken
    assert "packages/alpha/experiments/claims.py" in broken


def test_a_figure_is_there_for_light_and_for_dark(html):
    block = html.split('<article id="alpha-passes">')[1].split("</article>")[0]
    pictures = [(tag, a) for tag, a in Page(block).tags if tag in ("source", "img")]
    assert [tag for tag, _ in pictures] == ["source", "img"]
    dark, light = pictures[0][1], pictures[1][1]
    assert dark["media"] == "(prefers-color-scheme: dark)"
    assert dark["srcset"] != light["src"]
    assert light["src"].startswith("data:image/svg+xml;base64,")
    assert light["alt"] == "The curve"


def test_a_result_of_another_scale_says_so_and_how_to_run_it_again(html):
    text = article(html, "beta-passes")
    assert "From another run: laptop scale on cpu" in text
    assert "--claims passes --scale laptop --seeds 5" in text
    assert "From another run" not in article(html, "beta-fails")


def test_results_of_older_sources_are_marked(folder, html):
    documents, _ = report.load(folder / "reports")
    assert "have changed since" not in html
    documents[0]["fingerprint"] = "newer"
    assert "the sources or libraries have changed since" in report.render(documents)


def test_a_report_without_finished_claims_still_makes_a_page(folder):
    documents, _ = report.load(folder / "reports")
    assert "0 claims of 1 package," in Page(report.render([documents[0] | {"claims": []}])).text


def test_the_page_goes_beside_the_reports_by_default(folder, capsys):
    assert report.main(["--reports", str(folder / "reports")]) == 0
    assert (folder / "reports" / "index.html").is_file()
    assert capsys.readouterr().out == f"report: {folder / 'reports' / 'index.html'}\n"


def test_a_broken_report_is_left_out_with_one_line(folder, tmp_path, capsys):
    for path in (folder / "reports").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "alpha.json").write_text('{"schema": 0}')
    assert report.main(["--reports", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (
        "tenfold report: alpha.json has schema 0, this version reads 1; left out\n"
    )
    assert 'id="alpha"' not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("content", [None, "not json"])
def test_no_usable_report_is_one_line_and_exit_2_and_no_page(tmp_path, capsys, content):
    if content:
        (tmp_path / "alpha.json").write_text(content)
    assert report.main(["--reports", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "--reports must be a folder with reports" in errors
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("arguments", [["--bogus"], ["positional"], ["--reports"]])
def test_a_wrong_option_is_one_line_and_exit_2(capsys, arguments):
    assert report.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "low", "high", "exact", "shown"),
    [
        (-0.02, -0.1096, 0.0696, False, ("\N{MINUS SIGN}0.020", "\N{MINUS SIGN}0.110 to 0.070")),
        (3e-9, 1e-9, 5e-9, False, ("3e-09", "1e-09 to 5e-09")),
        (-36864, -36864, -36864, True, ("\N{MINUS SIGN}36864", "")),
        (0.15, None, None, False, ("0.15", "no interval")),
        (None, None, None, False, ("not finite", "")),
    ],
)
def test_numbers_are_shown_with_their_interval(value, low, high, exact, shown):
    assert report.measured({"value": value, "low": low, "high": high, "exact": exact}) == shown
