"""Stores and messages of earlier versions are still read. record.py made the files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.backup import StreamBackup
from services.contract import history, subjects
from services.contract.codec import decode
from services.contract.messages import ChatRequest, SessionErased, StreamEvent, WorkerReport
from services.history.context import Snapshot
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.compatibility.record import FOLDER
from tests.history.samples import context, messages, sessions, status, until, url_of
from tests.history.samples import history as running_history
from tests.servers import Server, nats_server, running

VERSIONS = sorted(FOLDER.iterdir())
TENANT = subjects.OPEN_TENANT
KINDS: dict[str, Any] = {
    subjects.worker_request("*", "*"): ChatRequest,
    subjects.reply("*", "*", "*"): StreamEvent,
    subjects.report("*"): WorkerReport,
    subjects.erased("*"): SessionErased,
    subjects.HISTORY_LOG: history.LogRecord,
    subjects.history("context", "*"): history.ContextRequest,
    subjects.history("messages", "*"): history.MessagesRequest,
    subjects.history("sessions", "*"): history.SessionsRequest,
    subjects.history("describe", "*"): history.DescribeRequest,
    subjects.history("feedback", "*"): history.FeedbackRequest,
    subjects.history("clear", "*"): history.ClearRequest,
    subjects.history("delete", "*"): history.DeleteRequest,
}
"""The types of messages by subject."""


def recorded_messages(folder: Path) -> Iterator[tuple[str, bytes]]:
    for line in (folder / "messages.jsonl").read_text().splitlines():
        message = json.loads(line)
        yield message["subject"], message["data"].encode()


def kind_of(subject: str) -> Any:
    (kind,) = (kind for pattern, kind in KINDS.items() if subjects.matches(pattern, subject))
    return kind


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_message_is_read_with_all_its_known_fields(folder: Path) -> None:
    kinds = set()
    for subject, data in recorded_messages(folder):
        kind = kind_of(subject)
        read = decode(data, kind)
        sent, again = json.loads(data), json.loads(msgspec.json.encode(read))
        assert common(sent, again) == common(again, sent) != {}, subject
        kinds.add(type(read).__name__)
    assert {"ChatRequest", "Accepted", "Started", "Token", "Done", "WorkerReport"} <= kinds
    assert {"Exchange", "Described", "Cleared", "Erased"} <= kinds


def common(one: Any, other: Any) -> Any:
    """Return `one` without the fields that the other lacks, at any depth."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one
    return {name: common(value, other[name]) for name, value in one.items() if name in other}


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Server]:
    with running(nats_server(tmp_path)) as server:
        yield server


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
async def test_store_has_memory_messages_and_sessions(nats: Server, folder: Path) -> None:
    shown = json.loads((folder / "shown.json").read_text())
    async with Bus.connect(url_of(nats), "test") as bus:
        await StreamBackup(bus, folder).restore()
        await require_snapshots(bus)
        async with running_history(url_of(nats)):
            for session, expected in shown["messages"].items():
                views = msgspec.to_builtins(await messages(bus, session, tenant=TENANT))
                assert pairs(views) == pairs(expected), session
            turns = (await context(bus, "names", TENANT)).turns
            said = [each["model_response"] for each in shown["messages"]["names"]]
            assert [turn.response for turn in turns] == said
            listed = [(each["id"], each["title"]) for each in shown["sessions"]]

            async def are_listed() -> bool:
                page = await sessions(bus, TENANT)
                return [(each.id, each.title) for each in page.sessions] == listed

            await until(are_listed)
            state = await status(bus)
    assert state.warning is None and state.unreadable == 0


def pairs(views: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    fields = ("id", "user_prompt", "model_response", "finish_reason", "timestamp")
    return [tuple(str(view[field]) for field in fields) for view in views]


async def require_snapshots(bus: Bus) -> None:
    """Each snapshot can be read: history would read the log instead, and hide that it can't."""
    count = 0
    async for stored in Stream(bus, f"KV_{subjects.SESSIONS_BUCKET}").readable():
        if stored.data:
            decode(stored.data, Snapshot)
            count += 1
    assert count >= 3
