from pathlib import Path

import pytest

from deploy.generated import write_or_check


def test_stale_file_is_named_then_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {tmp_path / "a.md": "new é\n"}
    assert write_or_check(files, ["--check"]) == 1
    assert "a.md; `just lock`" in capsys.readouterr().err
    assert write_or_check(files, []) == 0 == write_or_check(files, ["--check"])
    assert (tmp_path / "a.md").read_text("utf-8") == "new é\n"
