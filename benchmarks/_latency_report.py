"""The tables of the latency benchmark, and the page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]
Variants = dict[tuple[str, str], dict[str, Any]]

PEER = "torch-pruning"
TITLES = {
    "emitted": "as emitted",
    "deployed": "deployed",
    "onnx": "ONNX Runtime",
    "compiled": "torch.compile",
    "dense": "dense",
    "ragged": "rbpfx",
    "rounded": "rbpfx, multiples of 16",
    PEER: "Torch-Pruning 1.6.1",
}

COLUMNS = (
    "over_dense_in_same_form",
    "over_dense",
    "over_torch_pruning",
    "over_torch_pruning_as_emitted",
)

INTRODUCTION = """\
# What pruning gives in time

Written by `python -m benchmarks.latency --markdown docs/latency.md`, from
`benchmarks/results/latency.json`.

torchvision's networks with random weights (no kernel is faster or slower for it), pruned by
magnitude without any training, at 224 pixels unless a heading says otherwise. All variants of a
network were measured in one process, one forward pass each in turns; a ratio is the median of the
ratios of all rounds, in brackets the interquartile range.

* **fewer MACs**: multiply-accumulates of the dense network over those of this one.
* **as emitted**, **deployed** (`rbpfx.deploy`), **ONNX Runtime**, **torch.compile**:
  times faster than the dense network *in the same form*; in the lines of the dense network, times
  faster than the dense network as emitted.
* **efficiency**: the ratio of times over the ratio of MACs. 1 means that every multiply-accumulate
  saved was time saved.
* **memory**: peak memory of a forward pass, parameters included, as a share of what the dense
  network takes as emitted.
* **over Torch-Pruning**: times faster than the network that Torch-Pruning 1.6.1 emits at the MACs
  of `rbpfx`, in the same form, and as that library leaves it. What Torch-Pruning does to
  LayerNorms is not exact: it normalises over the channels that stay, where rbpfx by default
  leaves the residual stream whole.
"""


def page(rows: Iterable[Row], environments: Sequence[dict[str, Any]] = ()) -> str:
    """The page of the documentation."""
    rows = list(rows)
    machines = {
        row["environment"]: environments[row["environment"]] for row in rows if environments
    }
    words = sorted({_machine(environment) for environment in machines.values()})
    measured = [f"Measured on: {'; '.join(words)}."] if words else []
    return "\n\n".join([INTRODUCTION.rstrip(), *measured, tables(rows, "github")]) + "\n"


def tables(rows: Iterable[Row], tablefmt: str = "simple") -> str:
    """What is common to the networks, then a section per device, batch size and ratio."""
    sections: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        place = (row["device"], row["threads"], row["image_size"], row["ratio"], row["batch"])
        sections.setdefault(place, []).append(row)
    parts = [part for place in sorted(sections) for part in _section(sections[place], tablefmt)]
    return "\n\n".join([*_summary(sections, tablefmt), *parts])


def variants(row: Row) -> Variants:
    """Those of a row, by source and form."""
    return {(v["source"], v["form"]): v for v in row["variants"]}


def _section(rows: list[Row], tablefmt: str) -> list[str]:
    lines: list[list[str]] = []
    forms = _forms(rows)
    for row in rows:
        found = variants(row)
        for source in dict.fromkeys(name for name, _ in found):
            lines.append(_line(row["network"], source, forms, found))
    form = _main_form(forms)
    headers = [
        "network",
        "widths",
        "fewer MACs",
        *(TITLES[form] for form in forms),
        f"efficiency, {TITLES[form]}",
        f"memory, {TITLES[form]}",
        f"over Torch-Pruning, {TITLES[form]}",
        f"{TITLES[form]} over Torch-Pruning as emitted",
    ]
    aligned = ["left", "left", *("right" for _ in headers[2:])]
    table = tabulate(lines, headers, tablefmt, disable_numparse=True, colalign=aligned)
    return [_heading(rows[0]), table, *_failures(rows)]


def _heading(row: Row) -> str:
    threads = f", {row['threads']} thread(s)" if row["device"] == "cpu" else ""
    size = "" if row["image_size"] == 224 else f", {row['image_size']} pixels"
    batch = f"batch {row['batch']}"
    return f"## {row['ratio']:g}x fewer MACs, {batch}, {row['device']}{threads}{size}"


def _line(network: str, source: str, forms: Sequence[str], found: Variants) -> list[str]:
    dense = found["dense", "emitted"]
    own = {form: found.get((source, form), {}) for form in forms}
    column = "over_dense" if source == "dense" else "over_dense_in_same_form"
    times = [_ratio(own[form].get(column)) for form in forms]
    if source == "dense":
        times[0] = f"{dense['milliseconds']:.4g} ms"
    main = own[_main_form(forms)]
    fewer = dense["macs"] / main["macs"] if "macs" in main else None
    efficient = efficiency(found, source, _main_form(forms))
    memory = _memory(main) / _memory(dense) if main.get("parameter_bytes") else None
    return [
        network,
        TITLES[source],
        "" if fewer is None or source == "dense" else f"{fewer:.2f}x",
        *times,
        "" if efficient is None else f"{efficient:.2f}",
        "" if memory is None else f"{memory:.2f}",
        "" if source == "dense" else _ratio(main.get("over_torch_pruning")),
        "" if source == "dense" else _ratio(main.get("over_torch_pruning_as_emitted")),
    ]


def efficiency(found: Variants, source: str, form: str) -> float | None:
    """Times faster over times fewer multiply-accumulates, against the dense network in a form."""
    own = found.get((source, form), {})
    if "over_dense_in_same_form" not in own:
        return None
    macs = found["dense", form]["macs"] / own["macs"]
    return float(own["over_dense_in_same_form"][1] / macs)


def _summary(sections: dict[tuple[Any, ...], list[Row]], tablefmt: str) -> list[str]:
    """Medians over the networks."""
    lines = []
    for place in sorted(sections):
        rows = [variants(row) for row in sections[place]]
        first = sections[place][0]
        for source in [name for name in TITLES if any((name, "emitted") in row for row in rows)]:
            for form in [] if source == "dense" else _forms(sections[place]):
                found = [e for row in rows if (e := efficiency(row, source, form)) is not None]
                own = [row.get((source, form), {}) for row in rows]
                cells = [_median([v[c][1] for v in own if c in v], "x") for c in COLUMNS]
                names = [_heading(first)[3:], TITLES[source], TITLES[form], str(len(found))]
                lines.append([*names, *cells, _median(found, "")])
    if not lines:
        return []
    headers = ["", "widths", "form", "networks", "over dense in that form"]
    headers += ["over dense as emitted", "over Torch-Pruning in that form"]
    headers += ["over Torch-Pruning as emitted", "efficiency"]
    table = tabulate(lines, headers, tablefmt, disable_numparse=True)
    return ["## In short: medians over the networks", table]


def _median(values: Sequence[float], unit: str) -> str:
    return f"{median(values):.2f}{unit}" if values else ""


def _failures(rows: Sequence[Row]) -> list[str]:
    """What is missing, by the reason."""
    told: dict[str, list[str]] = {}
    for row in rows:
        for v in row["variants"]:
            if "failure" in v:
                name = f"{row['network']} ({TITLES[v['source']]}, {TITLES[v['form']]})"
                told.setdefault(v["failure"], []).append(name)
    return [f"Not measured: {', '.join(names)}: {reason}" for reason, names in told.items()]


def _forms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(v["form"] for row in rows for v in row["variants"]))


def _main_form(forms: Sequence[str]) -> str:
    """The form whose efficiency and memory are shown."""
    return "deployed" if "deployed" in forms else forms[0]


def _ratio(quartiles: Sequence[float] | None) -> str:
    if quartiles is None:
        return ""
    low, middle, high = quartiles
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def _memory(variant: dict[str, Any]) -> int:
    return int(variant["parameter_bytes"] + variant["activation_bytes"])


def _machine(environment: dict[str, Any]) -> str:
    gpu = f", {environment['gpu']}" if environment["gpu"] else ""
    return f"{environment['cpu']}{gpu}, torch {environment['torch']}"
