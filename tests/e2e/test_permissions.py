"""Callers of NATS and rarer work of the services, with the permissions of an installation."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import nats
import nats.aio.msg
import nats.errors
import nats.js.errors
import pytest

from services.client.chat_client import ChatClient
from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import ExchangePage, MessagesRequest
from services.contract.messages import (
    ChatRequest,
    Done,
    RequestAdmitted,
    StreamEvent,
    Token,
    WorkerReport,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.streams import Stream
from tests.e2e.stack import Stack, running_stack
from tests.secured import SecuredServer
from tests.servers import wait_for

ANN, BOB = "ann", "bob"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for all tests of this module, with tenants and a key of NATS for one of them."""
    folder = tmp_path_factory.mktemp("stack")
    server = SecuredServer(folder)
    server.secrets.add_tenant(ANN)
    with running_stack(folder, nats=server, EDGE_API_KEYS="ann:a,bob:b") as stack:
        yield stack


@asynccontextmanager
async def connected_as(stack: Stack, user: str) -> AsyncIterator[Bus]:
    assert isinstance(stack.nats, SecuredServer)
    async with Bus.connect(stack.nats.url, "test", stack.nats.access(user)) as bus:
        yield bus


async def test_caller_of_a_tenant_shares_its_sessions(stack: Stack) -> None:
    async with connected_as(stack, "tenant-ann") as bus:
        request = ChatRequest(prompt="my name is Ada", session_id="shared", temperature=0)
        async with aclosing(ChatClient(bus, tenant=ANN).stream(request)) as events:
            answer = [event async for event in events]
        assert isinstance(answer[-1], Done)
        page = await bus.request(
            subjects.history("messages", ANN), MessagesRequest(10, "shared"), ExchangePage
        )
    assert [each.model_response for each in page.messages] == [text_of(answer)]
    over_http = await asyncio.to_thread(stack.chat, "what is my name?", "shared")
    assert "Ada" in over_http.text


def text_of(answer: list[StreamEvent]) -> str:
    return "".join(event.text for event in answer if isinstance(event, Token))


async def test_caller_can_not_have_another_tenant_disturbed(stack: Stack) -> None:
    """The worker itself may publish to what bob listens to, but not for ann."""
    request = ChatRequest(prompt="hello", session_id="s", request_id="r")
    async with connected_as(stack, "tenant-ann") as bus:
        subject = subjects.worker_request(await worker_id(bus), ANN)
        for foreign in (subjects.reply(BOB, "r", "1"), f"{subjects.tenant_inbox(BOB)}.x"):
            with pytest.raises(ServiceError, match="must name an inbox, and no other tenant's"):
                headers = {subjects.REPLY_HEADER: foreign}
                await bus.request(subject, request, RequestAdmitted, headers=headers)
        own = {subjects.REPLY_HEADER: subjects.reply(ANN, "r", "1")}
        await bus.request(subject, request, RequestAdmitted, headers=own)


async def worker_id(bus: Bus) -> str:
    """Return the id of the worker that reports next."""
    async with bus.inbox(subjects.report(subjects.ANY)) as reports:
        return decode((await reports.next(5)).data, WorkerReport).worker_id


@pytest.mark.parametrize("service", ["inference", "history"])
def test_health_check_works_as_the_user_of_its_service(stack: Stack, service: str) -> None:
    health = [sys.executable, "-m", "services.runtime.health", service]
    environ = os.environ | stack.user(service)
    assert subprocess.run(health, env=environ, timeout=30).returncode == 0
    environ["NATS_CREDS"] = "nowhere"
    failed = subprocess.run(health, env=environ, timeout=30, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("NATS_CREDS='nowhere' can't be used")


def test_history_repairs_the_log_with_its_permissions(stack: Stack) -> None:
    """A repair that a process began and did not finish: all records are moved, and moved back."""
    before = stack.chat("my name is Ada", "repaired").text
    stack.history.stop(signal.SIGTERM)

    async def begin_repair() -> None:
        async with stack.connect("operator") as bus:
            copy = Stream(bus, subjects.HISTORY_REPAIR_STREAM)
            await copy.ensure(subjects.HISTORY_REPAIR, 1 << 30, 0)

    asyncio.run(begin_repair())
    stack.history.start()
    log: Path = stack.history.log
    wait_for(lambda: "readable records were restored" in log.read_text(), "the repair")
    wait_for(lambda: stack.http.get("/readyz").status_code == 200, "history")
    assert [message["model_response"] for message in stack.messages("repaired")] == [before]
    assert "Ada" in stack.chat("what is my name?", "repaired").text


async def test_worker_can_not_replace_records(stack: Stack) -> None:
    """A message with `Nats-Rollup` would purge what is before it, if the stream allowed that."""
    subject = subjects.log(subjects.session_key(ANN, "rolled up"))
    async with connected_as(stack, "inference") as bus:
        for scope in ("all", "sub"):
            with pytest.raises(nats.js.errors.APIError, match="rollup not permitted"):
                await bus.jetstream.publish(subject, b"", headers={"Nats-Rollup": scope})


async def test_wildcards_and_streams_are_out_of_reach(stack: Stack) -> None:
    """What is refused has no effect: ann hears nothing of bob, and the log stays as it is."""
    assert isinstance(stack.nats, SecuredServer)
    user = stack.user("tenant-ann")
    heard = []

    async def hear(message: nats.aio.msg.Msg) -> None:
        heard.append(message.subject)

    async def ignore(_: Exception) -> None:
        pass

    client = await nats.connect(
        user["NATS_URL"],
        nkeys_seed=user["NATS_CREDS"],
        inbox_prefix=user["NATS_INBOX_PREFIX"],
        error_cb=ignore,
    )
    for pattern in (">", "chat.>", "chat.reply.bob.>", "_INBOX.>", "history.>", "$KV.>"):
        await client.subscribe(pattern, cb=hear)
    for call in ("PURGE", "DELETE", "INFO"):
        with pytest.raises((TimeoutError, nats.errors.Error, NoResponders)):
            await client.request(f"$JS.API.STREAM.{call}.HISTORY", timeout=0.2)
    headers = {"X-API-Key": "b"}
    body = {"prompt": "hello", "session_id": "bob's"}
    answer = await asyncio.to_thread(stack.http.post, "/chat", json=body, headers=headers)
    assert answer.status_code == 200
    await client.flush()
    assert heard == []
    await client.close()
    for line in stack.nats.violations():
        assert user["NATS_CREDS"] not in line
    stack.nats.log.write_text("")  # these refusals were wanted


def test_api_keys_are_managed_as_the_user_edge(stack: Stack) -> None:
    """The bucket of keys is out of reach for every other user."""
    keys = [sys.executable, "-m", "services.edge.manage_keys"]

    def run(user: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, environ = [*keys, *arguments], os.environ | stack.user(user)
        return subprocess.run(command, env=environ, timeout=30, capture_output=True, text=True)

    added = run("edge", "add", "cec")
    assert added.returncode == 0, added.stderr
    assert "cec" in run("edge", "list").stdout
    assert run("edge", "revoke", "cec").returncode == 0
    refused = run("tenant-ann", "list")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    stack.nats.log.write_text("")  # this refusal was wanted
