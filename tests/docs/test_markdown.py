"""The Markdown documents: what they name exists, and every line is short enough to read."""

import re
from pathlib import Path

import pytest

MAX_LINE_LENGTH = 100
DOCUMENTS = [
    *Path().glob("*.md"),
    *Path("docs").rglob("*.md"),
    *(Path(folder) / "README.md" for folder in ("bench/results", "examples", "model")),
]
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=str)


def prose(document: Path) -> str:
    """Return the text without its code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_DOCUMENT
def test_no_line_is_longer_than_100_characters(document: Path) -> None:
    lines = document.read_text().splitlines()
    assert [line for line in lines if len(line) > MAX_LINE_LENGTH] == []


@EVERY_DOCUMENT
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(document))
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_named_tests_exist() -> None:
    named = {
        match
        for document in DOCUMENTS
        for match in re.findall(r"`(tests/\S+?\.py)::(\w+)`", document.read_text())
    }
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in Path(file).read_text(), f"{file}::{name}"
