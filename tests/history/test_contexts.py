import pytest

from services.contract import subjects
from services.history.contexts import Contexts
from services.history.log import Log
from services.history.settings import HistorySettings
from services.runtime.bus import Bus
from services.runtime.streams import StoredMessage
from tests.history.samples import TENANT, append, exchange


async def test_what_is_logged_and_saved_while_a_context_is_read_is_in_it(
    bus: Bus, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, key = Log(bus, retention=0), subjects.session_key(TENANT, session_id)
    await log.ensure()
    contexts = Contexts(log, HistorySettings(), bus.spawn)
    await append(bus, session_id, exchange("a"))
    early = [await log.last(key)]
    await append(bus, session_id, exchange("b"))
    assert await contexts.save(key)
    read = log.last

    async def last(key: str) -> StoredMessage | None:
        return early.pop() if early else await read(key)

    monkeypatch.setattr(log, "last", last)
    assert [turn.request_id for turn in (await contexts.of(key)).turns] == ["a", "b"]
