"""The report as one page that needs nothing beside it: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rbpfx.report import Report
from rbpfx.reporting.charts import (
    coupling_chart,
    error_chart,
    gate_chart,
    line_chart,
    widths_chart,
)
from rbpfx.reporting.markup import Markup, element, join

STYLE = """
.rbpfx { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; }
.rbpfx h2 { font-size: 1.15em; margin: 2.2em 0 .5em; break-after: avoid; }
.rbpfx p { margin: .4em 0; max-width: 75ch; break-after: avoid; }
.rbpfx table { border-collapse: collapse; margin: .6em 0; }
.rbpfx th, .rbpfx td { padding: .25em .9em .25em 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent);
  font-variant-numeric: tabular-nums; background: none; }
.rbpfx th { font-weight: 600; white-space: nowrap; }
.rbpfx th:first-child, .rbpfx td:first-child, .rbpfx .words td { text-align: left; }
.rbpfx .words td { overflow-wrap: anywhere; }
.rbpfx .words td:first-child { min-width: 8em; }
.rbpfx .headline td:last-child { font-weight: 600; }
.rbpfx .warning { border-left: 4px solid #c2410c; padding-left: .8em; font-weight: 600; }
.rbpfx .grid { display: flex; flex-wrap: wrap; gap: 1em 1.4em; }
.rbpfx figure { margin: 0; break-inside: avoid; }
.rbpfx figcaption { font-size: .85em; }
.rbpfx svg { display: block; max-width: 100%; height: auto; overflow: visible; }
.rbpfx svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.rbpfx .halo text { paint-order: stroke; stroke: Canvas; stroke-width: 3px; }
.rbpfx .outline { fill: none; stroke: currentColor; stroke-opacity: .45; }
.rbpfx .node { fill: Canvas; stroke: currentColor; stroke-opacity: .6; }
.rbpfx .fill, .rbpfx .heat, .rbpfx .dot { fill: #3b82c4; }
.rbpfx .curve { fill: none; stroke: #3b82c4; stroke-width: 1.8; stroke-linejoin: round; }
.rbpfx .edge { fill: none; stroke: currentColor; stroke-opacity: .5; }
.rbpfx .back { stroke-dasharray: 3 3; stroke-opacity: .3; }
.rbpfx .head { fill: currentColor; fill-opacity: .6; }
.rbpfx .grid-line { stroke: currentColor; stroke-opacity: .12; }
.rbpfx .axis { stroke: currentColor; stroke-opacity: .6; }
.rbpfx .mark { stroke: #c2410c; stroke-width: 2; }
.rbpfx .reference { stroke: currentColor; stroke-opacity: .6; stroke-dasharray: 4 3; }
"""
PAGE = """
:root { color-scheme: light dark; }
body { margin: 2em; background: Canvas; color: CanvasText; }
h1 { font-size: 1.5em; margin: 0 0 .2em; }
@media print {
  :root { color-scheme: light; }
  body { margin: 0; }
  .rbpfx { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
FIGURES = {
    "loss": "loss",
    "bound": "loss and penalty",
    "cost": "expected share of the cost",
    "open_gates": "open units",
}
"""Figure of a curve -> what a chart calls it; accuracy is called as the metric."""


def render_html(report: Report) -> str:
    """The whole page: costs, exactness, widths, couplings, gates, curves, circumstances.

    It holds everything inline and runs no script. Names are escaped, whatever they are.
    """
    date = report.environment.get("date", "")
    sections = [
        ("", _headline(report)),
        ("Exactness", _exactness(report)),
        ("Widths", _widths(report)),
        ("What is computed from what", _coupling(report)),
        ("Gates over time", _gates(report)),
        ("Training", _curves(report)),
        ("Latency", _latency(report)),
        ("Channels that stay", _frozen(report)),
        ("Settings and circumstances", _circumstances(report)),
    ]
    body = element(
        "main",
        element("h1", f"Pruned by {report.method}"),
        element("p", f"{date} · {report.seconds:,.0f} s · {report.device}".removeprefix(" · ")),
        *(_section(title, content) for title, content in sections if content),
        class_="rbpfx",
    )
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"rbpfx: pruned by {report.method}"),
        element("style", Markup(STYLE + PAGE)),
    )
    page = element("html", element("head", head), element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def render_summary(report: Report) -> str:
    """The head of the page as a fragment, for notebooks."""
    folded = element("details", element("summary", "widths"), _widths(report))
    content = [element("style", Markup(STYLE)), _headline(report), _exactness(report), folded]
    return element("div", *content, class_="rbpfx")


def _section(title: str, content: Markup) -> Markup:
    return element("section", *([element("h2", title)] if title else []), content)


def _headline(report: Report) -> Markup:
    table = _table(report.rows(), ["", "dense", "pruned", "change"], "headline")
    remarks = report.remarks()
    if report.accuracy_after_cut is not None:
        cut = report.shown(report.accuracy_after_cut)
        remarks.append(f"{report.metric} right after the cut, before fine-tuning: {cut}")
    return join(table, *(element("p", remark) for remark in remarks))


def _exactness(report: Report) -> Markup:
    kind = "warning" if report.inexact else None
    return join(
        element("p", report.exactness(), class_=kind), error_chart(report.verification_error)
    )


def _widths(report: Report) -> Markup:
    if not report.widths:
        return Markup()
    said = "Outline: units before. Filled: units that stay. In the order of the network."
    left = [element("p", f"Excluded: {', '.join(report.excluded)}.")] if report.excluded else []
    return join(element("p", said), widths_chart(report.widths), *left)


def _coupling(report: Report) -> Markup:
    if not report.coupling:
        return Markup()
    said = (
        "A box is a group of channels that are decided together, filled as far as they stay. "
        "Arrows follow the data; dashed ones lead back into a group that starts earlier, as "
        "residual additions do."
    )
    chart = coupling_chart(report.widths, report.coupling)
    return join(element("p", said), element("div", chart, class_="halo"))


def _gates(report: Report) -> Markup:
    steps, counts = report.gates.steps, report.gates.counts
    if not steps:
        return Markup()
    said = (
        f"How likely units are to stay: from 0 (below) to 1 (above), at {len(steps)} moments from "
        f"step {steps[0]:,} to {steps[-1]:,}; the stronger, the more units."
    )
    charts = [gate_chart(name, moments) for name, moments in counts.items()]
    return join(element("p", said), element("div", *charts, class_="grid"))


def _curves(report: Report) -> Markup:
    asked = None if report.target is None else report.target.asked
    accuracy = report.dense.accuracy
    references = {"accuracy": accuracy, "cost": asked}
    percent = {"cost", *(["accuracy"] if report.metric == "accuracy" else [])}
    hardened = {
        entry["step"]: f"{entry.get('group')} hardened"
        for entry in report.history
        if type(entry.get("step")) is int
    }
    charts = [
        line_chart(
            f"{phase}: " + (report.metric if name == "accuracy" else FIGURES.get(name, name)),
            points,
            _percent if name in percent else "{:.4g}".format,
            references.get(name),
            hardened if phase == "noise" else {},
        )
        for phase, series in report.curves.items()
        for name, points in series.items()
    ]
    if not charts:
        return Markup()
    notes = {
        "Red ticks: a group is hardened, and its redundant units are zero from there on.": hardened,
        f"Dashed: the {report.metric} of the dense network.": accuracy,
        "Dashed: the target.": asked,
    }
    said = " ".join(note for note, applies in notes.items() if applies)
    return join(element("p", said), element("div", *charts, class_="grid"))


def _latency(report: Report) -> Markup:
    rows = []
    for batch, before in report.dense.latency.items():
        after = report.pruned.latency.get(batch, float("nan"))
        speeds = [f"{batch / seconds:,.0f} /s" if seconds else "" for seconds in (before, after)]
        times = [f"{1e3 * seconds:.2f} ms" for seconds in (before, after)]
        rows.append([str(batch), *times, f"{before / after:.2f}x" if after else "", *speeds])
    headers = ["batch", "dense", "pruned", "faster", "examples, dense", "examples, pruned"]
    return join(_table(rows, headers), element("p", f"Medians on {report.device}."))


def _frozen(report: Report) -> Markup:
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.frozen.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [[reason, ", ".join(names)] for reason, names in by_reason.items()]
    return _table(rows, ["reason", "where"], "words") if rows else Markup()


def _circumstances(report: Report) -> Markup:
    rows = {"method": report.method, **report.settings, **report.environment}
    return _table(rows.items(), (), "words")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _table(
    rows: Iterable[Sequence[str]], headers: Sequence[str], class_: str | None = None
) -> Markup:
    head = [element("tr", *(element("th", title) for title in headers))] if headers else []
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("table", *head, *body, class_=class_)


__all__ = ["render_html", "render_summary"]
