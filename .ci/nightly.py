"""The slow tests, part by part, and a JSON file that says what came of each.

This file is a script, and the plugin of the pytest that the script starts. The plugin picks the
tests of a part that have no outcome yet, and notes outcomes one by one, so that a part that is
stopped, by its time box or by hand, goes on from there when the same commit is tested in the same
environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

PARTS = {
    "kill": r"test_killed\.py",
    "distributed": r"^tests/distributed/",
    "fuzz": r"test_law\.py|::test_many_random_|::test_fuzzed_",
    "zoo": r"test_zoo\.py|test_real_models\.py",
    "other": "",
}
"""Parts by what the names of their tests contain; a test is of the first that fits."""

PACKAGES = ("torchvision", "timm", "transformers", "numpy", "onnx", "onnxruntime", "pytest")

# -- the plugin ---------------------------------------------------------------------------


def part_of(test: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, test))


def entries(log: Path) -> list[dict[str, Any]]:
    """The lines of a log: circumstances, outcomes of tests, and ends of parts."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def outcomes(log: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of every test."""
    return {entry["test"]: entry for entry in entries(log) if "test" in entry}


def note(log: Path, entry: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly-part")
    parser.addoption("--nightly-log", type=Path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done, part = outcomes(config.getoption("nightly_log")), config.getoption("nightly_part")
    items[:] = [i for i in items if part_of(i.nodeid) == part and i.nodeid not in done]


class Notes:
    """Notes every outcome; a failure of the teardown comes after that of the call, and counts."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome == "failed":
            entry["why"] = report.longreprtext[-1000:]
        note(self.log, entry)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the one that notes
        config.pluginmanager.register(Notes(config.getoption("nightly_log")))


# -- the script ---------------------------------------------------------------------------


def circumstances() -> dict[str, str]:
    """Commit, date, versions and processor."""
    from rbpfx.circumstances import environment

    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"commit": commit, **environment(), **versions}


def open_log(log: Path) -> None:
    """Keep a log that can go on here and now, else begin a new one."""
    now = circumstances()
    begun = (entries(log) or [{"date": ""}])[0]
    known = now["commit"] != "unknown" and not now["commit"].endswith("dirty")
    if not known or begun != {**now, "date": begun["date"]}:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(now) + "\n")


def run(part: str, log: Path, processes: int, seconds: float) -> bool:
    """Run what is left of a part; whether it came to its end."""
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-n", str(processes), "-q"]
    command += ["-p", "nightly", f"--nightly-part={part}", f"--nightly-log={log.resolve()}"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)}
    child = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        return child.wait(seconds) in (0, 1, 5)  # 0: passed, 1: some failed, 5: none were left
    except subprocess.TimeoutExpired:
        print(f"the time of {seconds:.0f} s is over")
        return False
    finally:
        for end in (signal.SIGINT, signal.SIGKILL):
            if child.poll() is None:
                os.killpg(child.pid, end)
                try:
                    child.wait(30)
                except subprocess.TimeoutExpired:
                    continue


def summary(part: str, log: Path) -> dict[str, Any]:
    """Counts, the seconds that the tests took one after the other, and why some failed."""
    tests = {test: entry for test, entry in outcomes(log).items() if part_of(test) == part}
    counts = Counter(entry["outcome"] for entry in tests.values())
    ends = [entry["complete"] for entry in entries(log) if entry.get("part") == part]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "complete": bool(tests) and ends[-1:] == [True],
        "seconds": round(sum(entry["seconds"] for entry in tests.values()), 1),
        "failures": {test: entry["why"] for test, entry in tests.items() if "why" in entry},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the slow tests in parts.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=3600, help="time box of each part")
    parser.add_argument("--processes", type=int, default=2, help="as -n of pytest-xdist")
    parser.add_argument("--json", type=Path, default=Path("runs/nightly.json"))
    options = parser.parse_args()
    log = options.json.with_suffix(".log")
    sys.path.insert(0, os.getcwd())
    open_log(log)
    for part in options.parts:
        print(f"\n=== {part}", flush=True)
        complete = run(part, log, options.processes, options.seconds)
        note(log, {"part": part, "complete": complete})
        ran = {entry.get("part") for entry in entries(log)}
        parts = {part: summary(part, log) for part in PARTS if part in ran}
        options.json.write_text(json.dumps({**entries(log)[0], "parts": parts}, indent=1) + "\n")
    for part in options.parts:
        print(part, *(f"{k}: {v}" for k, v in parts[part].items() if k != "failures"), sep=", ")
    return int(any(parts[p]["failed"] or not parts[p]["complete"] for p in options.parts))


if __name__ == "__main__":
    sys.exit(main())
