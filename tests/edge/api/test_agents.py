"""Agents on NATS, found and prompted with the protocol's own client, and by plain requests."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from synadia_ai.agents import Agent, Agents, ProtocolError, ResponseChunk, StatusChunk

from services.contract.messages import Failed, Progress, Token
from services.edge.api.agents import serving_agents
from services.edge.app import make_edge
from services.edge.keys import ApiKeys, parse_setting
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from tests.fakes import ACCEPTED, DONE, HELLO, answer_script, scripted_worker

PROMPT = "agents.prompt.finetunellm._.default"


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys()


@pytest.fixture
async def client(nats_url: str, keys: ApiKeys) -> AsyncIterator[Client]:
    """A connection to a server where an edge with `keys` serves agents."""
    async with Bus.connect(nats_url, "edge") as bus:
        edge = await make_edge(bus, asyncio.Event(), EdgeLimits(ping_seconds=0.05), keys)
        async with serving_agents(edge, pytest.fail):
            client = await nats.connect(nats_url)
            yield client
            await client.close()


@asynccontextmanager
async def finder(client: Client) -> AsyncIterator[Agents]:
    agents = Agents(nc=client)
    yield agents
    await agents.close()


async def replies(client: Client, subject: str, data: bytes) -> list[Msg]:
    """Return the messages of a reply, up to the one that ends it."""
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    await client.publish(subject, data, inbox)
    got: list[Msg] = []
    while True:
        message = await subscription.next_msg(5)
        if not message.data and not message.headers:
            return got
        got.append(message)


async def owners(client: Client) -> dict[str, Agent]:
    async with finder(client) as agents:
        found = await agents.discover()
    return {agent.owner: agent for agent in found if agent.agent == "finetunellm"}


async def test_client_finds_the_agent(client: Client) -> None:
    agent = (await owners(client))["_"]
    assert (agent.session_name, agent.protocol_version) == ("default", "0.3")
    assert agent.prompt_endpoint.subject == PROMPT
    assert agent.prompt_endpoint.max_payload_bytes == client.max_payload
    assert agent.prompt_endpoint.attachments_ok is False


async def test_agents_follow_the_names_of_keys(client: Client, keys: ApiKeys) -> None:
    keys.replace("just keys", parse_setting("ada:1,bob:2"))
    async with asyncio.timeout(30):
        while (await owners(client)).keys() != {"ada", "bob"}:
            pass
        keys.replace("just keys", parse_setting("bob:2"))
        while (await owners(client)).keys() != {"bob"}:
            pass


async def test_client_reads_an_answer(client: Client, nats_url: str, keys: ApiKeys) -> None:
    keys.replace("just keys", parse_setting("ada:1"))
    while "ada" not in await owners(client):
        pass
    script = answer_script(("reasoning", "Hm"), ("content", "Grüß "), ("content", "dich"))
    async with scripted_worker(nats_url, script) as worker, finder(client) as agents:
        (agent,) = [each for each in await agents.discover() if each.owner == "ada"]
        chunks = [chunk async for chunk in agent.prompt("hi")]
    assert chunks[0] == StatusChunk(status="ack")
    texts = [chunk.text for chunk in chunks if isinstance(chunk, ResponseChunk)]
    assert texts == ["Grüß ", "dich"]
    ((subject, request),) = worker.requests
    assert (subject, request.prompt, request.session_id) == ("chat.request.ada", "hi", "default")


async def test_session_and_model_are_those_of_the_request(client: Client, nats_url: str) -> None:
    body = {"prompt": "hi", "model": "demo:shout", "more": 1}
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await replies(client, PROMPT.replace("default", "my-chat"), json.dumps(body).encode())
    assert [json.loads(message.data) for message in got] == [
        {"type": "status", "data": "ack"},
        {"type": "response", "data": "Grüß "},
        {"type": "response", "data": "dich"},
    ]
    ((_, request),) = worker.requests
    assert (request.session_id, request.model) == ("my-chat", "demo:shout")


async def test_prompt_of_the_announced_session_is_answered_once(
    client: Client, nats_url: str
) -> None:
    """Two endpoints match its subject, in one queue group."""
    async with scripted_worker(nats_url, HELLO) as worker:
        for _ in range(5):
            await replies(client, PROMPT, b"hi")
    assert len(worker.requests) == 5


async def test_silence_is_filled_with_acks(client: Client, nats_url: str) -> None:
    script = (ACCEPTED, *(step for _ in range(4) for step in (0.03, Progress(0, 1, 9))), DONE)
    async with scripted_worker(nats_url, script):
        got = await replies(client, PROMPT, b"hi")
    assert len(got) > 1
    assert {message.data for message in got} == {b'{"type":"status","data":"ack"}'}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "400"),
        (b"{", "400"),
        (b'{"prompt":5}', "400"),
        (b'{"prompt":""}', "400"),
        (b"\xff", "400"),
        (b'{"prompt":"hi","attachments":[{"filename":"a","content":""}]}', "400"),
    ],
    ids=str,
)
async def test_invalid_prompt_is_an_error(
    client: Client, nats_url: str, data: bytes, status: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        (error,) = await replies(client, PROMPT, data)
    assert error.headers is not None and error.headers["Nats-Service-Error-Code"] == status
    assert error.headers["Nats-Service-Error"].startswith("invalid_request: ")
    assert worker.requests == []


@pytest.mark.parametrize(
    ("code", "status"),
    [("overloaded", 429), ("model_not_found", 404), ("timeout", 500), ("payload_too_large", 400)],
)
async def test_failure_is_an_error_of_the_protocol(
    client: Client, nats_url: str, code: str, status: int
) -> None:
    failed = Failed(code, "It failed.\nTry again.")  # type: ignore[arg-type]
    async with scripted_worker(nats_url, (ACCEPTED, Token(0, "a", (1,)), failed)):
        async with finder(client) as agents:
            (agent,) = [each for each in await agents.discover() if each.owner == "_"]
            with pytest.raises(ProtocolError, match=f"{status}.*{code}: It failed. Try again."):
                [chunk async for chunk in agent.prompt("hi")]


async def test_status_and_heartbeats_name_the_instance(client: Client) -> None:
    subscription = await client.subscribe("agents.hb.finetunellm.>")
    got = await client.request("agents.status.finetunellm._.other", b"", timeout=2)
    state = json.loads(got.data)
    assert (state["agent"], state["owner"], state["session"]) == ("finetunellm", "_", "other")
    info = json.loads((await client.request("$SRV.INFO.agents", b"", timeout=2)).data)
    assert info["metadata"]["protocol_version"] == "0.3" and state["interval_s"] == 30
    await subscription.unsubscribe()
