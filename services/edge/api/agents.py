"""
The Synadia Agent Protocol for NATS, version 0.3: its SDKs and the `nats` CLI find the model as an
agent and prompt it. Token 5 of a subject is a session, whose history is kept as that of `/chat`.
https://github.com/synadia-ai/synadia-agent-sdk-docs/blob/main/core-protocol.md
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Literal

from msgspec import Struct

from services.contract import prompts, subjects
from services.contract.codec import check_utf8, decode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.messages import ChatRequest, Done, Failed, ModelName, Token
from services.edge.context import Edge
from services.edge.errors import TABLE
from services.runtime import tracing
from services.runtime.deliveries import Delivery, Endpoint
from services.runtime.supervised import Fail, SupervisedLoop

SERVICE = "agents"
"""The name of the service and of its queue group, which the protocol prescribes."""
PROTOCOL_VERSION = "0.3"
SESSION = "default"
"""The session whose subject a tenant's agent announces; any other one can be prompted as well."""
ERROR_CODES = {400, 401, 403, 404, 409, 429, 500}
"""The protocol's statuses."""
MAX_DESCRIPTION_LENGTH = 200

log = logging.getLogger(__name__)


class Attachment(Struct, frozen=True):
    filename: str
    content: str


class Envelope(Struct, frozen=True):
    """A request. Other fields are ignored; `model` is ours."""

    prompt: str
    attachments: tuple[Attachment, ...] | None = None
    model: ModelName | None = None


class Chunk(Struct, frozen=True):
    """A part of the reply. An empty message without headers ends it."""

    type: Literal["status", "response"]
    data: str


ACK = Chunk("status", "ack")


class Heartbeat(Struct, frozen=True):
    """An agent's state, sent every `interval_s` seconds and as the reply of `status`."""

    agent: str
    owner: str
    session: str
    instance_id: str
    ts: str
    interval_s: int


@asynccontextmanager
async def serving_agents(edge: Edge, fail: Fail) -> AsyncIterator[None]:
    """Serve an agent for each tenant, and send its heartbeats. `fail` ends the process."""
    agents = Agents(edge)
    await agents.step()
    loop = SupervisedLoop("heartbeats of agents", agents.step, fail)
    edge.api_keys.on_change(loop.wake)
    async with loop.running():
        yield


class Agents:
    """The agents of all tenants that have API keys now."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._agents: dict[str, Agent] = {}

    async def step(self) -> float:
        """Start and stop agents, then send heartbeats. Return the seconds until the next ones."""
        tenants = set(self._edge.api_keys.tenants)
        for tenant in self._agents.keys() - tenants:
            await self._agents.pop(tenant).stop()
        for tenant in sorted(tenants - self._agents.keys()):
            agent = self._agents[tenant] = Agent(self._edge, tenant)
            await agent.start()
        for agent in self._agents.values():
            await agent.beat()
        return self._edge.limits.heartbeat_seconds


class Agent:
    """The models as the agent of one tenant, the `owner` in its subjects."""

    def __init__(self, edge: Edge, tenant: str) -> None:
        self._edge = edge
        self._tenant = tenant
        self._instance_id = ""

    async def start(self) -> None:
        """Announce the agent, and serve it in all sessions."""
        max_payload = {"max_payload": f"{self._edge.bus.max_payload}B", "attachments_ok": "false"}
        prompt, status = self._on_prompt, self._on_status
        endpoints = [
            Endpoint("prompt", self._subject("prompt", SESSION), prompt, max_payload),
            Endpoint("status", self._subject("status", SESSION), status),
            Endpoint("prompt-session", self._subject("prompt", subjects.ANY), prompt, max_payload),
            Endpoint("status-session", self._subject("status", subjects.ANY), status),
        ]
        metadata = {
            "agent": subjects.AGENT,
            "owner": self._tenant,
            "session": SESSION,
            "protocol_version": PROTOCOL_VERSION,
        }
        description = "A fine-tuned model with durable sessions"
        self._instance_id = await self._edge.bus.serve(SERVICE, description, endpoints, metadata)

    async def stop(self) -> None:
        await self._edge.bus.stop_serving(self._instance_id)

    async def beat(self) -> None:
        """Send a heartbeat."""
        subject = self._subject("hb", SESSION)
        await self._edge.bus.publish(subject, self._heartbeat(SESSION))

    def _subject(self, verb: Literal["prompt", "status", "hb"], session: str) -> str:
        return subjects.agent(verb, self._tenant, session)

    def _heartbeat(self, session: str) -> Heartbeat:
        return Heartbeat(
            subjects.AGENT,
            self._tenant,
            session,
            self._instance_id,
            datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            round(self._edge.limits.heartbeat_seconds),
        )

    async def _on_status(self, delivery: Delivery) -> None:
        async def state(delivery: Delivery) -> Heartbeat:
            return self._heartbeat(subjects.session_of_agent(delivery.subject))

        self._edge.bus.respond(delivery, state)

    async def _on_prompt(self, delivery: Delivery) -> None:
        if self._edge.bus.has_reply_inbox(delivery):
            self._edge.bus.spawn(self._answer(delivery))

    async def _answer(self, delivery: Delivery) -> None:
        """Send the chunks of the answer, or an error, and then the end of the reply."""
        bus, reply = self._edge.bus, delivery.reply
        try:
            with tracing.span("prompt agent", "server"):
                await self._send_answer(read_request(delivery), reply)
        except ServiceError as error:
            await bus.send(reply, headers=_error_headers(error))
        except Exception:
            log.exception("prompting an agent failed subject=%s", delivery.subject)
            message = "The service failed. Its log has the error."
            await bus.send(reply, headers=_error_headers(ServiceError("internal", message)))
        finally:
            await bus.send(reply)

    async def _send_answer(self, request: ChatRequest, reply: str) -> None:
        """Raises ServiceError if the answer fails."""
        bus, sent_at = self._edge.bus, time.monotonic()
        await bus.publish(reply, ACK)
        async with aclosing(self._edge.chat_client(self._tenant).stream(request)) as events:
            async for event in events:
                match event:
                    case Token(channel="content", text=text) if text:
                        await bus.publish(reply, Chunk("response", text))
                        sent_at = time.monotonic()
                    case Failed():
                        raise self._edge.workers.to_error(event)
                    case Done():
                        return
                    case _ if time.monotonic() - sent_at >= self._edge.limits.ping_seconds:
                        await bus.publish(reply, ACK)  # callers give up after 60 silent seconds
                        sent_at = time.monotonic()


def read_request(delivery: Delivery) -> ChatRequest:
    """
    Return the request of a prompt: an Envelope in JSON, or the plain text. Raises
    ServiceError(invalid_request).
    """
    is_json = delivery.data.lstrip()[:1] == b"{"
    check_utf8(delivery.data)
    envelope = decode(delivery.data, Envelope) if is_json else Envelope(delivery.data.decode())
    if envelope.attachments:
        raise ServiceError(
            "invalid_request", "The model reads text only: send no `attachments`, see the endpoint."
        )
    request = ChatRequest(
        prompt=envelope.prompt,
        model=envelope.model,
        session_id=subjects.session_of_agent(delivery.subject),
    )
    prompts.check(request)
    return request


def _error_headers(error: ServiceError) -> dict[str, str]:
    description = f"{error.code}: {error.message}".replace("\n", " ")[:MAX_DESCRIPTION_LENGTH]
    return {
        "Nats-Service-Error-Code": str(_status(error.code)),
        "Nats-Service-Error": description,
    }


def _status(code: ErrorCode) -> int:
    """Return the protocol's status for a code."""
    status = TABLE[code].status
    if code == "overloaded":
        return 429
    if status in ERROR_CODES:
        return status
    return 400 if status < 500 else 500
