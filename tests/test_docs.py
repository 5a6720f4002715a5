"""What the code says about its documents holds: the sections of docs/METHOD.md that docstrings cite, and the files that they name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("emosteer", "tests") for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


def test_every_cited_section_of_the_method_exists() -> None:
    sections = set(re.findall(r"^## (\d+)\.", (ROOT / "docs" / "METHOD.md").read_text("utf-8"), re.M))
    cited = {(path.name, number) for path in SOURCES for number in re.findall(r"METHOD(?:\.md)? section (\d+)", path.read_text("utf-8"))}
    assert len(cited) >= 7 and {number for _, number in cited} <= sections


def test_every_document_that_is_named_exists() -> None:
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "emosteer")]
    pages = [*package, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"\b(?:docs|bench)/[A-Z_]+\.md\b", page.read_text("utf-8"))}
    assert len(named) >= 10
    assert not [(page, name) for page, name in sorted(named) if not (ROOT / name).is_file()]
