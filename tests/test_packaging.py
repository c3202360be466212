"""The package: the versions it promises are the ones that are tested."""

import re
from pathlib import Path

import rbpfx

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def numbers(version: str) -> list[int]:
    """A version without the zeros at its end."""
    return [int(part) for part in re.sub(r"(\.0)*$", "", version).split(".")]


def test_the_lowest_versions_are_those_that_ci_installs() -> None:
    listed = re.search(r"\ndependencies = \[(.*?)\]", PROJECT, re.DOTALL)
    assert listed is not None
    promised = re.findall(r'"([a-z]+)>=([0-9.]+)"', listed[1])
    tested = re.findall(r"^([a-z]+)==([0-9.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.M)
    assert {n: numbers(v) for n, v in tested} == {n: numbers(v) for n, v in promised}


def test_the_version_is_told_once() -> None:
    assert f'version = "{rbpfx.__version__}"' in PROJECT
    assert f"## [Unreleased] {rbpfx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_type_information_ships() -> None:
    assert (ROOT / "rbpfx" / "py.typed").exists()
    assert "rbpfx = py.typed" in (ROOT / "setup.cfg").read_text()
