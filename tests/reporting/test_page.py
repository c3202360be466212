"""The page: well-formed, self-contained, safe to open whatever the names in it."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rbpfx import Front, InputError, Report, reporting
from rbpfx.reporting import render_html, render_summary
from rbpfx.reporting.charts import line_chart, ticks
from rbpfx.reporting.markup import Markup, element, shortened
from tests.reporting.conftest import Run

EVIL = '<script>alert("1")</script>&\''


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return run.result.report


def with_evil_names(report: Report) -> Report:
    """The report of a network, a metric and settings that are named by an attacker."""
    renamed = {"stem": EVIL, "conv1": f"{EVIL}2"}
    return dataclasses.replace(
        report,
        method=EVIL,
        metric=EVIL,
        device=EVIL,
        widths={renamed[name]: width for name, width in report.widths.items()},
        coupling={renamed["stem"]: (renamed["conv1"],)},
        gates=dataclasses.replace(
            report.gates, counts={renamed[n]: c for n, c in report.gates.counts.items()}
        ),
        frozen={EVIL: EVIL},
        excluded=(EVIL,),
        inexact=(EVIL,),
        settings={EVIL: EVIL},
        environment={"date": EVIL},
        history=[{"step": 1, "group": EVIL}],
        curves={EVIL: {EVIL: [(1, 0.5), (2, 0.25)]}, **report.curves},
    )


def test_the_page_holds_every_section_in_order(report: Report) -> None:
    page = render_html(report)
    checker = checked(page)
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "Exactness",
        "Widths",
        "What is computed from what",
        "Gates over time",
        "Training",
        "Latency",
        "Channels that stay",
        "Settings and circumstances",
    ]
    text = " ".join(checker.texts)
    for cells in report.rows():
        for cell in cells:
            assert cell in text
    assert report.exactness() in text
    assert "accuracy right after the cut" in text
    assert checker.seen.count("figure") == len(report.gates.counts) + sum(
        map(len, report.curves.values())
    )


def test_the_page_needs_nothing_beside_it(report: Report) -> None:
    page = render_html(report)
    assert not re.search(r"https?:|//|@import|src=|href=", page)
    assert not re.search(r"url\((?!#)", page)
    assert {"script", "link", "img", "iframe"}.isdisjoint(checked(page).seen)


def test_no_name_is_taken_for_markup(report: Report) -> None:
    evil = with_evil_names(report)
    for page in (render_html(evil), render_summary(evil)):
        checker = checked(page)
        assert "script" not in checker.seen
        assert EVIL in "".join(checker.texts)
        assert re.search(r"<script|alert\(\"", page) is None


def test_the_drawings_are_well_formed(report: Report) -> None:
    drawings = re.findall(r"<svg.*?</svg>", render_html(with_evil_names(report)), re.DOTALL)
    assert len(drawings) > 5
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        numbers = [v for e in root.iter() for v in e.attrib.values() if v in ("nan", "inf", "-inf")]
        assert numbers == []


def test_what_is_unknown_is_left_out(report: Report) -> None:
    bare = dataclasses.replace(
        report,
        target=None,
        frozen={},
        history=[],
        curves={},
        gates=type(report.gates)(),
        coupling={},
        settings={},
        environment={},
        accuracy_after_cut=None,
    )
    page = render_html(bare)
    checked(page)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Exactness",
        "Widths",
        "Latency",
        "Settings and circumstances",
    ]
    assert "None" not in page


def test_what_is_not_exact_is_a_warning(report: Report) -> None:
    assert 'class="warning"' not in render_html(report)
    page = render_html(dataclasses.replace(report, inexact=("norm",), verification_error=0.03))
    assert '<p class="warning">NOT EXACT' in page


def test_notebooks_show_the_summary(run: Run) -> None:
    shown = run.result._repr_html_()
    assert shown == run.result.report._repr_html_() == render_summary(run.result.report)
    checked(shown)
    assert "<table" in shown


def test_notebooks_show_a_sweep_as_a_table(run: Run) -> None:
    front = Front([run.result, run.result])
    assert checked(front._repr_html_()).seen.count("tr") == 3
    assert str(front).count("50.0% of the MACs") == 2


def test_the_suffix_chooses_the_format(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(report)
    with pytest.raises(InputError, match=r"not 'report\.docx'"):
        report.write(tmp_path / "report.docx")


@pytest.mark.parametrize("name", ["report.html", "report.svg"])
def test_an_interrupted_write_leaves_the_old_file(
    name: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for renderer in ("render_html", "render_picture"):
        monkeypatch.setattr(reporting, renderer, interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "old")]


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert element("p", "<b>", Markup("<b></b>"), title='"') == (
        '<p title="&quot;">&lt;b&gt;<b></b></p>'
    )


def test_long_names_lose_letters_before_numbers() -> None:
    assert shortened("conv1", 10) == "conv1"
    assert shortened("features.denseblock1.conv1", 18) == "featu.dense1.conv1"
    assert len({shortened(f"encoder.layers.layer_{i}.mlp.fc1", 16) for i in range(99)}) == 99
    assert len(shortened("1" * 99, 20)) == 20
    assert shortened("", 5) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.983, 0.9851), (-3.0, 1e6), (1e-9, 2e-9)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 5
    slack = 1e-9 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)


@pytest.mark.parametrize(
    "points",
    [[(1, 0.5)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (5, 0.0)], [(1, float("nan")), (3, 1.0)]],
)
def test_curves_of_any_shape_are_drawn(points: list[tuple[int, float]]) -> None:
    assert "<polyline" in line_chart("loss", points)


def test_a_curve_of_nothing_is_no_chart() -> None:
    assert line_chart("loss", [(1, float("inf"))]) == ""
