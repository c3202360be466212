"""The documentation: its code runs, its links lead somewhere, and the reference is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import squeezenet1_1

import rbpfx
from tests.pages import code_blocks, given_names, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

TESTED_ELSEWHERE = {
    "writing-a-rule.md": "test_testing.py",
    "writing-a-method.md": "test_writing_a_method.py",
}


def names_for(page: Path) -> dict[str, Any]:
    """What a page assumes: on saving and loading, a pruned network of torchvision."""
    names = given_names()
    if page.name == "saving.md":
        names["Net"] = squeezenet1_1
        images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
        options = {"target": rbpfx.Target(macs=0.5), "recovery": rbpfx.FineTune(epochs=0)}
        names["result"] = rbpfx.prune(squeezenet1_1(), images, method="magnitude", **options)
    return names


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_code() -> list[Path]:
    return [page for page in PAGES if code_blocks(page) and page.name not in TESTED_ELSEWHERE]


@pytest.mark.parametrize("page", with_code(), ids=relative)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names = names_for(page)
    for code in code_blocks(page):
        run(code, page, names)


@pytest.mark.parametrize(("page", "test"), TESTED_ELSEWHERE.items())
def test_other_pages_have_tests_of_their_own(page: str, test: str) -> None:
    assert page in (ROOT / "tests" / test).read_text()


def anchors(page: Path) -> set[str]:
    """What mkdocs calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{relative(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{relative(page)} links to {link}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", reference, re.M)}
    public = {name for name in rbpfx.__all__ if not name.startswith("_")}
    assert public - listed == {name for name in public if hasattr(rbpfx.errors, name)}
