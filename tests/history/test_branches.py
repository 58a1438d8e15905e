"""Trees of responses: their branches, how single responses are deleted, and what lists show."""

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from msgspec.structs import replace

from services.contract import responses, subjects
from services.contract.errors import ServiceError
from services.contract.history import (
    Branch,
    BranchRequest,
    Cleared,
    Exchange,
    ExchangeRequest,
    Imported,
    LogRecord,
    Removed,
    RemoveRequest,
)
from services.contract.messages import Empty
from services.contract.responses import ResponseTurn
from services.history.branches import TreeCache, branch, exchanges_of
from services.history.entry import Entry
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import (
    FAST,
    TENANT,
    append,
    archived,
    clear,
    connected,
    context,
    describe,
    erase,
    exchange,
    export,
    history,
    import_exchanges,
    messages,
    sessions,
    until,
    uri_of,
    url_of,
)
from tests.servers import Server, nats_server, running

ROOT = "a" * 32
PAGES = 120
"""Responses, more than history reads from MongoDB at once."""


def id_of(name: str, tree: str = ROOT) -> str:
    return tree + name.encode().hex().rjust(32, "0")


def response(
    name: str, parent: str = "", tree: str = ROOT, is_in_conversation: bool = False
) -> Exchange:
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": name}]}
    parent_id = id_of(parent, tree) if parent else None
    return replace(
        exchange(id_of(name, tree)),
        turn=ResponseTurn(parent=parent_id, input=(item,), is_in_conversation=is_in_conversation),
    )


def names(exchanges: tuple[Exchange, ...] | list[Exchange]) -> str:
    return " ".join(bytes.fromhex(each.request_id[32:]).decode().strip("\0") for each in exchanges)


TREE = [
    response("root"),
    response("left", "root"),
    response("right", "root"),
    response("leaf", "right"),
    response("orphan", "gone"),
    response("c1", is_in_conversation=True),
    response("c2", is_in_conversation=True),
    response("side", "c1"),
]


@pytest.mark.parametrize(
    ("name", "limit", "expected"),
    [
        ("root", None, "root"),
        ("left", None, "root left"),
        ("leaf", None, "root right leaf"),
        ("leaf", 1, "leaf"),
        ("orphan", 1, "orphan"),
        ("c2", None, "c1 c2"),
        ("side", None, "c1 side"),
    ],
)
def test_branch_is_the_path_to_a_response(name: str, limit: int | None, expected: str) -> None:
    assert names(branch(TREE, id_of(name), limit)) == expected


def test_branch_of_a_conversation_has_all_its_exchanges() -> None:
    assert names(branch(TREE, None)) == "c1 c2"
    assert names(branch(TREE, None, 1)) == "c2"


@pytest.mark.parametrize("name", ["unknown", "orphan"])
def test_branch_with_an_unknown_response_is_not_found(name: str) -> None:
    with pytest.raises(ServiceError, match="does not exist, or was deleted"):
        branch(TREE, id_of(name))


def test_branch_of_a_forged_cycle_ends() -> None:
    with pytest.raises(ServiceError, match="does not exist"):
        branch([response("a", "b"), response("b", "a")], id_of("a"))


def test_removed_and_repeated_exchanges_are_left_out() -> None:
    now = datetime.now(UTC)
    records: list[LogRecord] = [
        Removed(previous=0, removed_at=now, request_id=id_of("a")),
        response("a"),  # its worker was faster than the removal
        response("b"),
        response("b"),
        Cleared(previous=0, cleared_at=now),
    ]
    entries = [Entry(seq, "key", now, record) for seq, record in enumerate(records, 1)]
    assert names(exchanges_of(entries)) == "b"


def test_cache_evicts_the_oldest_trees() -> None:
    cache = TreeCache(max_bytes=25)
    for key in ("one", "two", "three"):
        cache.put(key, [], 10)
    assert [cache.take(key)[1] for key in ("one", "two", "three", "three")] == [0, 10, 10, 0]
    cache.put("small", [], 10)
    cache.put("large", [], 26)
    assert cache.take("large") == ([], 0)
    assert cache.take("small") == ([], 10), "a large tree of one tenant leaves it"


# --- the service ---

Ask = Callable[..., Awaitable[Branch]]


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of this file: a log that was archived once expects MongoDB for what it lacks."""
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    async with history(nats_url), Bus.connect(nats_url, "test") as bus:
        yield bus


@pytest.fixture
def tree() -> str:
    return uuid4().hex


async def read(bus: Bus, tree: str, name: str | None, limit: int | None = None) -> Branch:
    wanted = BranchRequest(tree, id_of(name, tree) if name else None, limit)
    return await bus.request(subjects.history("branch", TENANT), wanted, Branch, timeout=5)


async def remove(bus: Bus, tree: str, name: str) -> None:
    wanted = RemoveRequest(id_of(name, tree))
    await bus.request(subjects.history("remove", TENANT), wanted, Empty, timeout=5)


async def add(bus: Bus, tree: str, *parts: tuple[str, str]) -> None:
    session = responses.session_of_tree(tree)
    for name, parent in parts:
        await append(bus, session, response(name, parent, tree))


async def test_two_answers_to_one_parent_are_two_branches(bus: Bus, tree: str) -> None:
    await add(bus, tree, ("root", ""), ("left", "root"), ("right", "root"))
    assert names((await read(bus, tree, "left")).exchanges) == "root left"
    await add(bus, tree, ("leaf", "right"))  # after the tree was cached
    found = await read(bus, tree, "leaf")
    assert names(found.exchanges) == "root right leaf" and found.is_complete
    assert found.exchanges[0].turn == response("root", "", tree).turn


async def test_branch_of_an_unknown_tree_is_not_found(bus: Bus, tree: str) -> None:
    for name in ("root", None):
        with pytest.raises(ServiceError) as raised:
            await read(bus, tree, name)
        assert raised.value.code == "not_found"


async def test_removed_response_is_gone_from_log_and_branches(bus: Bus, tree: str) -> None:
    session = responses.session_of_tree(tree)
    await add(bus, tree, ("root", ""), ("middle", "root"), ("leaf", "middle"))
    await read(bus, tree, "leaf")
    await remove(bus, tree, "middle")
    assert names((await read(bus, tree, "root")).exchanges) == "root"
    assert names((await read(bus, tree, "leaf", 1)).exchanges) == "leaf"
    for name in ("middle", "leaf"):
        with pytest.raises(ServiceError, match="does not exist, or was deleted"):
            await read(bus, tree, name)
    assert names((await export(bus, session)).exchanges) == "root leaf"
    assert [each.user_prompt for each in await messages(bus, session)] == [
        f"prompt of {id_of(name, tree)}" for name in ("root", "leaf")
    ]
    with pytest.raises(ServiceError, match="No answer has this request id"):
        wanted = ExchangeRequest(id_of("middle", tree))
        await bus.request(subjects.history("exchange", TENANT), wanted, Exchange, timeout=5)


async def test_response_that_ends_after_its_removal_stays_hidden(bus: Bus, tree: str) -> None:
    await add(bus, tree, ("root", ""))
    await remove(bus, tree, "late")
    await add(bus, tree, ("late", "root"))
    with pytest.raises(ServiceError, match="was deleted"):
        await read(bus, tree, "late")


async def test_trees_are_not_listed_as_sessions_but_erased_like_them(bus: Bus, tree: str) -> None:
    session, tenant = responses.session_of_tree(tree), f"t{tree}"
    await append(bus, session, response("root", "", tree), tenant)
    await append(bus, "usual", exchange("r1"), tenant)
    assert [each.id for each in (await sessions(bus, tenant)).sessions] == ["usual"]
    await erase(bus, session, tenant)
    assert await messages(bus, session, tenant=tenant) == ()
    wanted = BranchRequest(tree, id_of("root", tree))
    with pytest.raises(ServiceError, match="does not exist"):
        await bus.request(subjects.history("branch", tenant), wanted, Branch, timeout=5)


async def test_context_of_a_tree_has_no_turns(bus: Bus, tree: str) -> None:
    await add(bus, tree, ("root", ""))
    found = await context(bus, responses.session_of_tree(tree))
    assert found.turns == () and found.applied_seq > 0


async def test_conversation_keeps_metadata_and_added_items(bus: Bus, tree: str) -> None:
    session = responses.session_of_tree(tree)
    await add(bus, tree, ("plain", ""))
    with pytest.raises(ServiceError, match="conversation does not exist"):
        await read(bus, tree, None)
    await describe(bus, session, metadata={"topic": "demo"})
    added = response("added", "", tree, is_in_conversation=True)
    item = Imported(request_id=added.request_id, prompt="", response="", turn=added.turn)
    await import_exchanges(bus, session, [item, item])
    found = await read(bus, tree, None)
    assert names(found.exchanges) == "added" and found.metadata == {"topic": "demo"}
    await clear(bus, session)
    assert (await read(bus, tree, None)).exchanges == ()


async def test_export_of_a_tree_can_be_imported(bus: Bus, tree: str) -> None:
    await add(bus, tree, ("root", ""), ("leaf", "root"))
    session = responses.session_of_tree(tree)
    exported = (await export(bus, session)).exchanges
    known = Imported.__struct_fields__
    lines = [Imported(**{name: getattr(each, name) for name in known}) for each in exported]
    await erase(bus, session)
    await import_exchanges(bus, session, lines)
    found = (await read(bus, tree, "leaf")).exchanges
    assert [each.turn for each in found] == [each.turn for each in exported]


async def test_branch_that_exceeds_a_message_is_incomplete(bus: Bus, tree: str) -> None:
    long = replace(response("root", "", tree), response="x" * 600_000)
    await append(bus, responses.session_of_tree(tree), long)
    long = replace(response("leaf", "root", tree), response="x" * 600_000)
    await append(bus, responses.session_of_tree(tree), long)
    found = await read(bus, tree, "leaf")
    assert names(found.exchanges) == "leaf" and not found.is_complete


async def test_tree_too_large_for_memory_is_rejected(
    empty_nats: Server, empty_mongo: Server, empty_bus: Bus, tree: str
) -> None:
    limits = dataclasses.replace(FAST, max_read_tree_bytes=PAGES * 6000)
    parts = [(f"{n:03}", f"{n - 1:03}" if n else "") for n in range(PAGES)]
    async with history(url_of(empty_nats), uri_of(empty_mongo), limits):
        await connected(empty_bus)
        await add(empty_bus, tree, *parts)
        for _ in range(2):  # read, then from the cache
            assert len((await read(empty_bus, tree, parts[-1][0])).exchanges) == PAGES
        await archived(empty_bus)
        await context(empty_bus, responses.session_of_tree(tree))
        stream = Stream(empty_bus, subjects.HISTORY_STREAM)
        for seq in range(1, PAGES):  # as the trimmer does, once the log is half full
            await stream.delete(seq)
    async with history(url_of(empty_nats), uri_of(empty_mongo), limits):
        await connected(empty_bus)
        assert len((await read(empty_bus, tree, parts[-1][0])).exchanges) == PAGES
    limits = dataclasses.replace(FAST, max_read_tree_bytes=PAGES * 3000)
    async with history(url_of(empty_nats), uri_of(empty_mongo), limits):
        await connected(empty_bus)
        with pytest.raises(ServiceError, match="begin a new conversation") as rejected:
            await read(empty_bus, tree, parts[-1][0])
        assert rejected.value.code == "payload_too_large"


async def test_archive_has_trees_and_forgets_removed_responses(
    empty_nats: Server, empty_mongo: Server, empty_bus: Bus, tree: str
) -> None:
    session = responses.session_of_tree(tree)
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await add(empty_bus, tree, ("root", ""), ("leaf", "root"), ("other", "root"))
        await archived(empty_bus)
        await remove(empty_bus, tree, "other")
        await archived(empty_bus)
        js = empty_bus.jetstream
        for seq in range(1, 4):  # as the trimmer does, once the log is half full
            stored = await js.get_msg("HISTORY", next=True, seq=seq, subject="history.log.>")
            if stored.seq == seq:
                await js.delete_msg("HISTORY", seq)
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        assert names((await read(empty_bus, tree, "leaf")).exchanges) == "root leaf"
        with pytest.raises(ServiceError, match="does not exist"):
            await read(empty_bus, tree, "other")
        await erase(empty_bus, session)

        async def is_erased() -> bool:
            return await messages(empty_bus, session) == ()

        await until(is_erased)
