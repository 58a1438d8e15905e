from pathlib import Path

import pytest

from services.history.settings import HistorySettings
from services.runtime.settings import InvalidSetting, load


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 7_776_000), ("12h", 43_200), ("30m", 1800), ("600s", 600)]
)
def test_retention_has_a_unit(text: str, seconds: int) -> None:
    assert load(HistorySettings, {"HISTORY_RETENTION": text}).retention_seconds == seconds


def test_no_retention_is_zero_seconds() -> None:
    assert load(HistorySettings, {}).retention_seconds == 0


@pytest.mark.parametrize("text", ["30", "0d", "-1d", "30 d", "forever", "30000d"])
def test_invalid_retention_is_an_invalid_setting(text: str) -> None:
    with pytest.raises(InvalidSetting, match="HISTORY_RETENTION"):
        load(HistorySettings, {"HISTORY_RETENTION": text})


@pytest.mark.parametrize("text", ["0", "101", "ten"])
def test_number_of_exchanges_is_limited(text: str) -> None:
    with pytest.raises(InvalidSetting, match="HISTORY_EXCHANGES"):
        load(HistorySettings, {"HISTORY_EXCHANGES": text})


def test_uri_file_replaces_the_uri(tmp_path: Path) -> None:
    path = tmp_path / "mongodb_uri"
    path.write_text("mongodb://ada:secret@db:27017/\n")
    given = {"MONGODB_URI": "mongodb://other:27017/", "MONGODB_URI_FILE": str(path)}
    assert load(HistorySettings, given).mongodb_uri == "mongodb://ada:secret@db:27017/"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "can't be read: No such file"), (b"\n", "is empty"), (b"\xff", "it is not UTF-8")],
)
def test_uri_file_without_a_uri_is_an_error(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "mongodb_uri"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidSetting, match=f"MONGODB_URI_FILE='.*' .*{reason}"):
        load(HistorySettings, {"MONGODB_URI_FILE": str(path)})
