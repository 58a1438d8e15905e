"""
Check that a tag is the version of this tree, and write the text of its release.

    python -m deploy.release v0.2.0 notes.md        prints 0.2.0
"""

import sys
from pathlib import Path

from services.contract.version import VERSION


class NotReady(Exception):
    """This tree can't be released under the tag. The message says why."""


def notes(tag: str, version: str, changelog: str) -> str:
    """Return the section of the version. Raises NotReady."""
    if tag != f"v{version}":
        raise NotReady(f"The tag {tag} is not v{version}: change the version in pyproject.toml.")
    sections = (each.partition("\n") for each in changelog.split("\n## "))
    text = next((body.strip() for title, _, body in sections if title.split()[0] == version), "")
    if not text:
        raise NotReady(f"CHANGELOG.md has no section `## {version}`: rename `## Unreleased`.")
    return text


if __name__ == "__main__":
    try:
        text = notes(sys.argv[1], VERSION, Path("CHANGELOG.md").read_text())
    except NotReady as error:
        sys.exit(str(error))
    Path(sys.argv[2]).write_text(f"{text}\n")
    print(VERSION)
