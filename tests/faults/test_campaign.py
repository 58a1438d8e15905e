"""The random campaign for seconds; `just chaos` runs it for minutes, each time with a new seed."""

from pathlib import Path

import pytest

from tests.faults import campaign

SECONDS = 40
SEED = 7


@pytest.mark.campaign
@pytest.mark.timeout(200)
def test_clients_get_right_answers_while_parts_die_and_freeze(tmp_path: Path) -> None:
    result = campaign.run(tmp_path, SECONDS, SEED)
    assert len(result.faults) >= SECONDS / campaign.INTERVAL_SECONDS - 2
    assert {outcome.kind for outcome in result.outcomes} == {"http", "cancel", "client", "plain"}
