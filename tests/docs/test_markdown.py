"""What docs/ name is there."""

import re
from pathlib import Path

DOCS = sorted(Path("docs").glob("*.md"))


def test_every_test_that_is_named_exists() -> None:
    named = {
        match
        for path in DOCS
        for match in re.findall(r"`(tests/\S+?\.py)::(\w+)`", path.read_text())
    }
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in Path(file).read_text(), f"{file}::{name}"
