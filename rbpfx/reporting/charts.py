"""The charts of the page as inline SVG; colours follow the text around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, isfinite, log10

from rbpfx.reporting.layout import detour, edges, place
from rbpfx.reporting.markup import Markup, element, join, shortened
from rbpfx.training.record import BINS

BOX = 13
"""Height of a box of the coupling graph."""

Widths = Mapping[str, tuple[int, int]]
"""Group name -> (units before, units after)."""


def widths_chart(widths: Widths) -> Markup:
    """For every group an outline as long as its dense width, filled as far as units stay."""
    row, right, bar = 20, 130, 560
    names = {name: shortened(name, 36) for name in widths}
    left = 20 + 6.6 * max(map(len, names.values()))
    scale = bar / max(before for before, _ in widths.values())
    rows = []
    for index, (name, (before, after)) in enumerate(widths.items()):
        y = index * row
        rows.append(
            element(
                "g",
                element("title", f"{name}: {after} of {before} units stay"),
                _label(left - 10, y + 14, names[name], text_anchor="end"),
                _box(left, y + 4, max(before * scale, 2), 12, "outline"),
                _box(left, y + 4, max(after * scale, 1), 12, "fill"),
                _label(
                    left + before * scale + 8, y + 14, f"{after} / {before} ({after / before:.0%})"
                ),
            )
        )
    return _svg(left + bar + right, row * len(widths), "Units of every group", *rows)


def coupling_chart(widths: Widths, coupling: Mapping[str, Sequence[str]]) -> Markup:
    """The groups as boxes as long as they are wide, the input above; arrows follow the data."""
    column, row = 158, 74
    placed = place(list(widths), coupling)
    arrows = edges(list(widths), coupling)
    bends = {
        (source, target): detour(placed[source], placed[target], placed.values())
        for source, target in arrows
        if placed[target][1] > placed[source][1]
    }
    sides = [0.5 - min(x for x, _ in placed.values()), *(abs(b) + 0.3 for b in bends.values())]
    middle = max(sides) * column + 20
    points = {name: (middle + x * column, 12 + y * row) for name, (x, y) in placed.items()}
    widest = max(before for before, _ in widths.values())
    length = {
        name: 18 + (column - 42) * (before / widest) ** 0.5 for name, (before, _) in widths.items()
    }
    curves = []
    for source, target in arrows:
        start, end = points[source], points[target]
        if (source, target) in bends:
            path, class_ = _down(start, end, bends[source, target] * column), "edge"
        else:
            path, class_ = _back(start, end, length[source] / 2, length[target] / 2), "edge back"
        curves.append(element("path", d=path, class_=class_, marker_end="url(#rbpfx-arrow)"))
    lines = element("g", join(*curves), opacity=0.5 if len(arrows) > 3 * len(widths) else None)
    nodes = []
    for name, (before, after) in widths.items():
        x, y = points[name]
        left = x - length[name] / 2
        nodes.append(
            element(
                "g",
                element("title", f"{name}: {after} of {before} units stay"),
                _box(left, y, length[name], BOX, "node"),
                _box(left, y, length[name] * after / before, BOX, "fill"),
                _label(x, y + BOX + 11, shortened(name, 24), text_anchor="middle"),
                _label(x, y + BOX + 23, f"{after} / {before}", text_anchor="middle"),
            )
        )
    head = element("path", d="M0 0L6 3L0 6z", class_="head")
    marker = element(
        "marker",
        head,
        id="rbpfx-arrow",
        markerWidth=6,
        markerHeight=6,
        refX=5,
        refY=3,
        orient="auto",
    )
    rows = max(y for _, y in placed.values()) + 1
    return _svg(2 * middle, rows * row, "Coupling graph", element("defs", marker), lines, *nodes)


def gate_chart(name: str, counts: Sequence[Sequence[int]]) -> Markup:
    """How open the units of a group were: time to the right, open above, darker where more are."""
    cell, height = 12.0, 4.0
    squares = []
    for moment, bins in enumerate(counts):
        total = max(sum(bins), 1)
        squares += [
            _box(
                moment * cell,
                (BINS - 1 - place_) * height,
                cell,
                height,
                "heat",
                fill_opacity=f"{(count / total) ** 0.5:.2f}",
            )
            for place_, count in enumerate(bins)
            if count
        ]
    width, tall = cell * len(counts), height * BINS
    frame = _box(0, 0, width, tall, "outline")
    picture = _svg(width, tall, f"Gates of {name} over time", *squares, frame)
    return element("figure", picture, element("figcaption", shortened(name, 26), title=name))


def line_chart(
    title: str,
    points: Sequence[tuple[int, float]],
    show: Callable[[float], str] = "{:.3g}".format,
    reference: float | None = None,
    marks: Mapping[int, str] | None = None,
) -> Markup:
    """A curve over the steps.

    Args:
        title: What it shows.
        points: (step, value) pairs; values that are no finite numbers are left out.
        show: How a value is written.
        reference: A value that a dashed line marks.
        marks: Step -> what happened there: ticks at the lower edge.
    """
    width, height, left, bottom = 300, 150, 46, 20
    points = [(step, value) for step, value in points if isfinite(value)]
    if not points:
        return Markup()
    values = [value for _, value in points] + ([] if reference is None else [reference])
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (width - left - 10)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (height - bottom - 12)

    parts = []
    for tick in ticks(low, high):
        parts.append(_line(left, y(tick), width - 10, y(tick), "grid-line"))
        parts.append(_label(left - 6, y(tick) + 4, show(tick), text_anchor="end"))
    for step, what in (marks or {}).items():
        if not first <= step <= last:
            continue
        tick_mark = element("title", what)
        parts.append(
            _line(x(step), height - bottom - 6, x(step), height - bottom, "mark", tick_mark)
        )
    if reference is not None:
        parts.append(_line(left, y(reference), width - 10, y(reference), "reference"))
    parts.append(_line(left, height - bottom, width - 10, height - bottom, "axis"))
    parts.append(_label(left, height - 5, f"step {first:,}"))
    parts.append(_label(width - 10, height - 5, f"{last:,}", text_anchor="end"))
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts.append(element("polyline", points=path, class_="curve"))
    if len(points) <= 8:
        parts += [element("circle", cx=x(s), cy=y(v), r=3, class_="dot") for s, v in points]
    return element("figure", element("figcaption", title), _svg(width, height, title, *parts))


def error_chart(error: float) -> Markup:
    """Where an error lies between the rounding of float64 and nothing in common, on a log scale."""
    width, y = 640, 34

    def x(value: float) -> float:
        return 20 + (min(max(log10(value), -18), 0) + 18) / 18 * (width - 40)

    parts: list[str] = [_line(20, y, width - 20, y, "axis")]
    for value, what in (
        (2.0**-52, "rounding of float64"),
        (2.0**-23, "of float32"),
        (1.0, "100 %"),
    ):
        parts.append(_line(x(value), y - 5, x(value), y + 5, "axis"))
        anchor = "end" if value == 1 else "middle"
        parts.append(_label(x(value), y + 20, what, text_anchor=anchor))
    place_ = x(error) if error > 0 else 20.0
    parts.append(element("circle", cx=place_, cy=y, r=6, class_="dot"))
    parts.append(_label(place_, y - 14, f"{error:.1e}", text_anchor="middle"))
    return _svg(width, 60, "Difference between the sliced and the masked network", *parts)


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers from low to high."""
    raw = (high - low) / 4
    power = 10.0 ** floor(log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = -floor(-low / step)
    return [step * i for i in range(first, floor(high / step) + 1)]


def _down(start: tuple[float, float], end: tuple[float, float], bend: float) -> str:
    """A curve from below the text of a box to the top of another, `bend` to the side half-way."""
    (x1, y1), (x2, y2) = (start[0], start[1] + BOX + 27), (end[0], end[1] - 1)
    reach = (y2 - y1) / 3 if bend else (y2 - y1) / 2
    return _curve(x1, y1, x1 + bend / 0.75, y1 + reach, x2 + bend / 0.75, y2 - reach, x2, y2)


def _back(start: tuple[float, float], end: tuple[float, float], half1: float, half2: float) -> str:
    """A curve up, from the side of a box to the side of another, between the columns."""
    (x1, y1), (x2, y2) = start, end
    side1, side2 = (1, -1) if x1 < x2 else (-1, 1) if x1 > x2 else (-1, -1)
    x1, x2 = x1 + side1 * half1, x2 + side2 * (half2 + 1)
    y1, y2 = y1 + BOX / 2, y2 + BOX / 2
    return _curve(x1, y1, x1 + side1 * 70, y1, x2 + side2 * 60, y2, x2, y2)


def _curve(*points: float) -> str:
    x, y, *rest = (f"{value:.1f}" for value in points)
    return f"M{x} {y}C{' '.join(rest)}"


def _svg(width: float, height: float, title: str, *children: str) -> Markup:
    return element(
        "svg",
        join(*children),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        role="img",
        aria_label=title,
    )


def _box(
    x: float, y: float, width: float, height: float, class_: str, **attributes: object
) -> Markup:
    return element("rect", x=x, y=y, width=width, height=height, class_=class_, **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str, *children: str) -> Markup:
    return element("line", *children, x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _label(x: float, y: float, text: str, **attributes: object) -> Markup:
    return element("text", text, x=x, y=y, **attributes)


__all__ = ["coupling_chart", "error_chart", "gate_chart", "line_chart", "ticks", "widths_chart"]
