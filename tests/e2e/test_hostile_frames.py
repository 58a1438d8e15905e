"""Services keep answering whatever is published to their subjects."""

import asyncio
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from services.contract import subjects
from tests import frames
from tests.e2e.stack import Process, Stack, running_stack
from tests.servers import NATS_VERSIONS, NatsVersion, nats_server, wait_for

HEARD_BY_WORKERS = ("chat.request", "chat.request.ann", "chat.cancel.ann.x", "chat.replay.ann.x")
HEARD_BY_ALL = ("chat.worker.x.report", "$SRV.PING", "$SRV.INFO.history", "$SRV.STATS.inference")
VERBS = "context messages clear delete exchange sessions describe export import".split()
HEARD_BY_HISTORY = (
    "history.status",
    *(f"history.{verb}.ann" for verb in VERBS),
    *(f"history.{verb}.ann.any" for verb in VERBS),
)


def hostile_frames(worker_id: str) -> Iterator[bytes]:
    own = (
        f"chat.worker.{worker_id}.{verb}" for verb in ("request.ann", "count", "unheard.a.b.c.d")
    )
    for subject in chain(HEARD_BY_WORKERS, HEARD_BY_ALL, HEARD_BY_HISTORY, own):
        yield from frames.unreadable(subject.encode())
        yield from frames.odd(subject.encode())
    for before, after in (
        (b"chat.request.", b""),
        (b"chat.cancel.", b".x"),
        (b"chat.worker.", b".report"),
        (b"history.context.", b""),
        (b"history.export.", b".any"),
        (b"chat.worker.%b.unheard." % worker_id.encode(), b""),
    ):
        yield from frames.bad_tokens(before, after)


def poisonous_records() -> list[bytes]:
    subject = subjects.log(subjects.session_key("ann", "s")).encode()
    headers = (*frames.UNREADABLE_HEADERS, *frames.ODD_HEADERS)
    return [
        *frames.bad_tokens(b"history.log.", b".eA"),
        *frames.bad_tokens(b"history.log.ann."),
        *(frames.hpub(subject, header, b"garbage") for header in headers),
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("version", NATS_VERSIONS)
def test_next_chat_is_answered_without_a_reconnect(
    version: NatsVersion, tmp_path: Path, mongodb_uri: str
) -> None:
    nats = nats_server(tmp_path, version=version)
    database = f"frames_{version}"
    with running_stack(tmp_path, mongodb_uri, nats=nats, MONGODB_DATABASE=database) as stack:
        assert stack.chat("my name is Ada", "s").end["done"]
        worker_id = stack.status()["workers"][0]["worker_id"]
        asyncio.run(frames.send(nats.port, hostile_frames(worker_id)))
        assert "Ada" in stack.chat("what is my name?", "s").text
        records = poisonous_records()
        asyncio.run(frames.send(nats.port, records))
        assert "Ada" in stack.chat("what is my name again?", "s").text
        wait_for(lambda: _are_set_aside(stack, len(records)), "records set aside")
        for process in (stack.history, stack.inference, stack.edge):
            check_log(process)


def _are_set_aside(stack: Stack, records: int) -> bool:
    history = stack.status()["history"]
    return history is not None and (history["unreadable"], history["unarchived"]) == (records, 0)


def check_log(process: Process) -> None:
    log = process.log.read_text()
    assert "can't be parsed" in log, "the process has seen the frames"
    for bad in ("Traceback", "NATS disconnected", "disconnected from NATS"):
        assert bad not in log, f"{process.name}: {bad}"
    assert len(log.splitlines()) < 150, "the log is not flooded"
