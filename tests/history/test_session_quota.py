"""A tenant begins no more sessions than it may, and keeps those that it has."""

import dataclasses
from collections.abc import AsyncIterator

import pytest

from services.contract import responses, subjects
from services.contract.errors import ServiceError
from services.contract.history import Context, ContextRequest, Imported
from services.runtime.bus import Bus
from services.runtime.consumers import message_sizes
from tests.history.samples import (
    FAST,
    append,
    clear,
    context,
    describe,
    erase,
    exchange,
    history,
    ids,
    import_exchanges,
    sessions,
    until,
    url_of,
)
from tests.servers import Server

ANN, BOB = "ann", "bob"
MAX = 3
LINE = Imported(request_id="i", prompt="p", response="r")


@pytest.fixture
async def served(empty_nats: Server) -> AsyncIterator[None]:
    limits = dataclasses.replace(FAST, session_bytes=4096)
    async with history(url_of(empty_nats), limits=limits, history_max_sessions=MAX):
        yield


async def is_full(bus: Bus, tenant: str = ANN) -> bool:
    """Ask as a worker does before it generates the first answer of a session."""
    try:
        await context(bus, "beyond", tenant)
    except ServiceError as error:
        assert (error.code, error.retry_after) == ("too_many_sessions", None)
        return True
    return False


async def fill(bus: Bus, tenant: str = ANN) -> None:
    for n in range(MAX):
        await describe(bus, f"s{n}", tenant, title="T")
    await until(lambda: is_full(bus, tenant))


async def test_no_session_begins_beyond_the_limit(served: None, empty_bus: Bus) -> None:
    await fill(empty_bus)
    for beginning in (
        describe(empty_bus, "another", ANN, title="T"),
        import_exchanges(empty_bus, "another", [LINE], ANN),
        context(empty_bus, "another", ANN),
    ):
        with pytest.raises(ServiceError, match=r"has 3 sessions .* may have 3 .*: delete some"):
            await beginning
    assert len((await sessions(empty_bus, ANN)).sessions) == MAX
    assert not await is_full(empty_bus, BOB)


async def test_log_warns_before_the_limit(
    served: None, empty_bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    line = Imported(request_id="large", prompt="p", response="x" * int(4096 * MAX * 0.8))
    await import_exchanges(empty_bus, "large", [line], BOB)
    await until(lambda: "raise HISTORY_MAX_SESSIONS tenant=bob sessions=1 of=3" in caplog.text)
    assert not await is_full(empty_bus, BOB)


async def test_stored_sessions_go_on_at_the_limit(served: None, empty_bus: Bus) -> None:
    await fill(empty_bus)
    assert not (await context(empty_bus, "s0", ANN)).turns
    await append(empty_bus, "s0", exchange("a"), ANN)
    await import_exchanges(empty_bus, "s1", [LINE], ANN)
    await describe(empty_bus, "s2", ANN, title="Other")
    await clear(empty_bus, "s2", ANN)
    assert ids(await context(empty_bus, "s0", ANN)) == ["a"]


async def test_answer_that_was_generated_is_stored(served: None, empty_bus: Bus) -> None:
    """Its session was new when the request was accepted, as others that ran beside it."""
    await fill(empty_bus)
    request, subject = ContextRequest("another", is_answered=True), subjects.history("context", ANN)
    assert await empty_bus.request(subject, request, Context) == Context()


async def test_erased_sessions_make_room(served: None, empty_bus: Bus) -> None:
    await fill(empty_bus)
    await erase(empty_bus, "s0", ANN)

    async def has_room() -> bool:
        return not await is_full(empty_bus)

    await until(has_room)
    await describe(empty_bus, "another", ANN, title="T")
    await until(lambda: is_full(empty_bus))


async def test_trees_of_responses_are_counted(served: None, empty_bus: Bus) -> None:
    for n in range(MAX):
        session = responses.session_of_tree(f"{n:032x}")
        await append(empty_bus, session, exchange(f"r{n}"), ANN)
    await until(lambda: is_full(empty_bus))


async def test_bytes_of_sessions_are_limited_too(served: None, empty_bus: Bus) -> None:
    """One session of the size of all: it goes on, but takes no more imports."""
    line = Imported(request_id="large", prompt="p", response="x" * 4096 * MAX)
    await import_exchanges(empty_bus, "large", [line], ANN)
    await until(lambda: is_full(empty_bus))
    with pytest.raises(ServiceError, match="MiB") as rejected:
        await import_exchanges(empty_bus, "large", [LINE], ANN)
    assert rejected.value.code == "too_many_sessions"
    assert ids(await context(empty_bus, "large", ANN)) == ["large"]


async def test_full_tenant_is_found_after_a_restart(empty_nats: Server, empty_bus: Bus) -> None:
    async with history(url_of(empty_nats)):
        for n in range(MAX):
            await describe(empty_bus, f"s{n}", ANN, title="T")
    async with history(url_of(empty_nats), history_max_sessions=MAX):
        await until(lambda: is_full(empty_bus))


async def test_snapshots_of_erased_sessions_expire(empty_nats: Server, empty_bus: Bus) -> None:
    limits = dataclasses.replace(FAST, erased_snapshot_seconds=1)
    async with history(url_of(empty_nats), limits=limits):
        await append(empty_bus, "kept", exchange("k"), ANN)
        await context(empty_bus, "kept", ANN)
        for session in ("known", "again"):
            await append(empty_bus, session, exchange(session), ANN)
            await erase(empty_bus, session, ANN)
        epoch = (await context(empty_bus, "again", ANN)).epoch
        await append(empty_bus, "again", exchange("new", epoch), ANN)
        await context(empty_bus, "again", ANN)
        bucket = f"KV_{subjects.SESSIONS_BUCKET}"

        async def stored() -> set[str]:
            return {each.subject async for each in message_sizes(empty_bus, bucket)}

        prefix = f"$KV.{subjects.SESSIONS_BUCKET}."
        kept = {prefix + subjects.session_key(ANN, name) for name in ("kept", "again")}

        async def are_kept() -> bool:
            return await stored() == kept

        await until(are_kept)
        assert ids(await context(empty_bus, "again", ANN)) == ["new"]
        assert not (await context(empty_bus, "known", ANN)).turns
