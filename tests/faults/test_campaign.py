"""The random campaign for seconds; `just chaos` runs it for minutes, with another seed each time."""

from pathlib import Path

import pytest

from tests.faults import campaign

SECONDS = 40
SEED = 7


@pytest.mark.campaign
@pytest.mark.timeout(200)
def test_whatever_dies_or_freezes_no_caller_is_told_anything_wrong(tmp_path: Path) -> None:
    result = campaign.run(tmp_path, SECONDS, SEED)
    assert len(result.faults) >= SECONDS / campaign.INTERVAL - 2
    assert {told.kind for told in result.told} == {"http", "cancel", "client", "plain"}
