"""Compare the log, the contexts and MongoDB with what clients saw acknowledged."""

import asyncio
from typing import Any

from pymongo import MongoClient

from services.contract import subjects
from services.contract.history import Context, ContextRequest, Exchange
from services.history.entry import parse_entry
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.e2e.stack import Stack
from tests.servers import wait_for

CONTEXT_EXCHANGES = range(10, 14)  # of a session that has as many or more
DATABASE = "finetuneLLM"

Ids = dict[str, list[str]]
"""Request ids, by session, in order."""


def check(stack: Stack, mongodb_uri: str, acknowledged: Ids) -> int:
    """
    Check that the log has every acknowledged exchange once and in order, and that the context and
    MongoDB agree with it. Return the number of exchanges in the log.
    """
    wait_for_archive(stack)
    sessions = list(acknowledged)
    logged, shown = log_and_contexts(stack, sessions)
    archived = in_mongodb(mongodb_uri, sessions)
    for session, expected in acknowledged.items():
        found = logged[session]
        assert len(found) == len(set(found)), f"{session}: a repeat in the log: {found}"
        assert [i for i in found if i in expected] == expected, f"{session}: {found}, {expected}"
        assert archived[session] == found, f"{session}: MongoDB {archived[session]}, log {found}"
        size = len(shown[session])
        assert shown[session] == found[len(found) - size :], f"{session}: context {shown[session]}"
        assert size == len(found) or size in CONTEXT_EXCHANGES
    return sum(map(len, logged.values()))


def log_and_contexts(stack: Stack, sessions: list[str]) -> tuple[Ids, Ids]:
    """Return the request ids that the log has, and those of the contexts."""

    async def read_both() -> tuple[Ids, Ids]:
        async with stack.connect("ledger") as bus:
            shown = {session: await _in_context(bus, session) for session in sessions}
            return await _in_log(bus, sessions), shown

    return asyncio.run(read_both())


def wait_for_archive(stack: Stack) -> None:
    wait_for(lambda: stack.status()["database_connected"], "MongoDB")
    wait_for(lambda: stack.status()["history"]["unarchived"] == 0, "the archive", 60)


def check_erased(stack: Stack, mongodb_uri: str, session: str) -> None:
    wait_for_archive(stack)
    logged, shown = log_and_contexts(stack, [session])
    there = logged[session], shown[session], in_mongodb(mongodb_uri, [session])[session]
    assert there == ([], [], []), f"{session}: log, context, MongoDB have {there}"


def in_mongodb(uri: str, sessions: list[str]) -> Ids:
    client: MongoClient[dict[str, Any]] = MongoClient(uri)
    with client:
        found: Ids = {}
        for session in sessions:
            query = {"key": _key(session)}
            documents = client[DATABASE]["exchanges"].find(query).sort([("seq", 1)])
            found[session] = [document["request_id"] for document in documents]
        return found


async def _in_log(bus: Bus, sessions: list[str]) -> Ids:
    stream, seq = Stream(bus, subjects.HISTORY_STREAM), 1
    found: Ids = {_key(session): [] for session in sessions}
    while stored := await stream.next(subjects.HISTORY_LOG, seq):
        entry = parse_entry(stored)
        if entry.key in found and isinstance(entry.record, Exchange):
            found[entry.key].append(entry.record.request_id)
        seq = stored.seq + 1
    return {session: found[_key(session)] for session in sessions}


async def _in_context(bus: Bus, session: str) -> list[str]:
    subject = subjects.history("context", subjects.OPEN_TENANT)
    context = await bus.request(subject, ContextRequest(session), Context, timeout=5)
    return [turn.request_id for turn in context.turns]


def _key(session: str) -> str:
    return subjects.session_key(subjects.OPEN_TENANT, session)
