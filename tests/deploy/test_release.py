import pytest

from deploy.release import NotReady, notes

CHANGELOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\nAdded:\n\n- a\n\n## 0.1.0\n\n- b\n"


@pytest.mark.parametrize(("version", "text"), [("0.2.0", "Added:\n\n- a"), ("0.1.0", "- b")])
def test_notes_are_the_section_of_the_version(version: str, text: str) -> None:
    assert notes(f"v{version}", version, CHANGELOG) == text


@pytest.mark.parametrize(
    ("tag", "version", "message"),
    [
        ("v0.2.0", "0.1.0", "is not v0.1.0: change the version"),
        ("0.1.0", "0.1.0", "is not v0.1.0"),
        ("v0.3.0", "0.3.0", "no section `## 0.3.0`"),
    ],
)
def test_tag_that_can_not_be_released_is_an_error(tag: str, version: str, message: str) -> None:
    with pytest.raises(NotReady, match=message):
        notes(tag, version, CHANGELOG)
