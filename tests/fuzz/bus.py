"""Sends generated messages to every subject of the bus, and checks that requests are answered."""

import base64
import re
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from hypothesis import strategies as st

from deploy.asyncapi import CHANNELS, Channel
from services.contract import subjects
from services.contract.codec import decode
from services.contract.messages import (
    ChatRequest,
    Conversation,
    Done,
    Failed,
    RequestAdmitted,
    Resume,
    Sampling,
    StreamEvent,
    Tokens,
)
from services.runtime.access import NatsAccess
from services.runtime.bus import ALIVE_HEADER, Bus
from services.runtime.deliveries import Inbox, InboxLimits, NoResponders
from services.runtime.settings import ServiceSettings, parse
from tests.e2e.stack import Stack
from tests.fuzz.strategies import encoded, payloads, values_of

ANSWER_SECONDS = 45.0  # far longer than the demo model takes to fill its context window
INBOX_LIMITS = InboxLimits(messages=100_000, bytes=2**27)
"""Of the fuzzer's connection: it reads an answer only after it was generated."""
EVENT: Any = StreamEvent
PROMPT = base64.b64encode(bytes((40, 1, 0, 0, 41, 1, 0, 0))).decode()
"""Token ids of a resumed answer's prompt, 4 bytes each."""
BUGS = ("internal", "500")
"""Codes of replies to requests that raised another error than ServiceError; nats-py sends 500."""
ERROR_CODE = "Nats-Service-Error-Code"
MAY_BE_SILENT = ("replay", "agentPrompt", "agentStatus")
"""Only the worker that has the request replays it; an agent ignores sessions that it can't name."""

MORE_CHANNELS = (
    *(
        Channel(f"{each.name}Retry", subjects.retry(each.subject), "", each.message, each.reply)
        for each in CHANNELS
        if each.subject.startswith("history.") and each.subject.endswith("{tenant}")
    ),
    Channel("agentPrompt", "agents.prompt.finetunellm.{tenant}.{session}", "", None),
    Channel("agentStatus", "agents.status.finetunellm.{tenant}.{session}", "", None),
    Channel("undelivered", subjects.undelivered("{worker}", "{tenant}.{request}", 1, 1), "", None),
    Channel("ping", "$SRV.PING", "", None),
    Channel("stats", "$SRV.STATS.history", "", None),
)
"""What services hear beside the documented subjects."""
ALL_CHANNELS = (*CHANNELS, *MORE_CHANNELS)

tokens = st.sampled_from(("_", "ann", "x" * 64, "=", "$", "\u00e4")) | st.from_regex(
    "[A-Za-z0-9_-]{1,64}", fullmatch=True
)
header_values = st.sampled_from(
    ("", "0", "-1", "nan", "1e999", "1", "_INBOX.x", "chat.reply._.a.b")
)
header_names = st.sampled_from(
    (subjects.REPLY_HEADER, ALIVE_HEADER, ERROR_CODE, "Status", "Nats-Msg-Id", "traceparent")
)
foreign_replies = st.sampled_from(
    ("", "$JS.API.STREAM.PURGE.HISTORY", "chat.reply.other.a.b", "_INBOX.tenant.other.x", "history")
)


class Sent(NamedTuple):
    """One message. `reply` is None for an inbox of its own, at which an answer is awaited."""

    subject: str
    data: bytes
    headers: dict[str, str]
    reply: str | None


def connect(stack: Stack) -> AbstractAsyncContextManager[Bus]:
    """Connect as NATS' admin, who may publish on every subject."""
    settings = parse(ServiceSettings, stack.user("admin"))
    return Bus.connect(settings.nats_url, "fuzz", NatsAccess.of(settings), INBOX_LIMITS)


@st.composite
def chats(draw: st.DrawFn, digest: str) -> bytes:
    """
    Return a request that is likely to be answered: one input, and a few parameters. It may resume
    an answer of the model with this digest.
    """
    text = draw(st.text(min_size=1, max_size=40))
    inputs = (
        {"prompt": text},
        {"messages": [{"role": "user", "content": text}]},
        {"messages": draw(values_of(Conversation))},
        {"text": draw(values_of(Tokens) | st.just(text))},
    )
    names = draw(st.lists(st.sampled_from(Sampling.__struct_fields__), max_size=4))
    values = draw(values_of(Sampling))
    chosen = {name: value for name, value in values.items() if name in names}
    if draw(st.sampled_from((False, False, True))):
        resume = draw(values_of(Resume))
        chosen["resume"] = resume | {"state": resume["state"] | {"model": digest, "prompt": PROMPT}}
    return encoded(chosen | draw(st.sampled_from(inputs)))


def messages(channel: Channel, workers: list[dict[str, Any]]) -> st.SearchStrategy[Sent]:
    """
    Return a strategy for messages on the channel's subjects. `workers` are reports of those that
    run, the first one of the chat model.
    """
    sessions = st.text(min_size=1, max_size=20).map(
        lambda text: base64.urlsafe_b64encode(text.encode(errors="replace")).decode().rstrip("=")
    )
    data = payloads(channel.message)
    if channel.message is ChatRequest:
        data = chats(workers[0]["model"]["digest"]) | data
    known = {
        "worker": st.sampled_from([*(each["worker_id"] for each in workers), "nobody"]),
        "session": sessions,
    }
    parameters = {name: known.get(name, tokens) for name in re.findall(r"{(\w+)}", channel.subject)}
    return st.builds(
        Sent,
        st.fixed_dictionaries(parameters).map(lambda values: channel.subject.format(**values)),
        data,
        st.just({}) | st.dictionaries(header_names, header_values, max_size=2),
        st.none() | foreign_replies,
    )


async def send(bus: Bus, channel: Channel, sent: Sent) -> str:
    """
    Send the message. If it is a request, check its answer. Return `sent`, or how the answer ended:
    `success` or an error code. Raises AssertionError.
    """
    if sent.reply is not None:
        await bus.send(sent.subject, sent.data, sent.reply, sent.headers)
        return "sent"
    subject = bus.new_inbox()
    headers = dict(sent.headers)
    is_direct = channel.reply is RequestAdmitted
    events = bus.new_inbox()
    if is_direct:
        headers.setdefault(subjects.REPLY_HEADER, events)
    async with bus.inbox(subject) as replies, bus.inbox(events) as answers:
        await bus.send(sent.subject, sent.data, subject, headers)
        if channel.reply is None or channel.name in MAY_BE_SILENT:
            return "sent"
        try:
            outcome = await _outcome(replies, channel)
            if is_direct and outcome == "success" and headers[subjects.REPLY_HEADER] == events:
                outcome = await _end(answers)
        except NoResponders:
            return "no responders"
    assert outcome not in BUGS, sent
    return outcome


async def _outcome(replies: Inbox, channel: Channel) -> str:
    """Read the reply, or all events."""
    if channel.reply is StreamEvent:
        return await _end(replies)
    delivery = await replies.next(ANSWER_SECONDS)
    while ALIVE_HEADER in delivery.headers:
        delivery = await replies.next(ANSWER_SECONDS)
    if code := delivery.headers.get(ERROR_CODE):
        return code
    decode(delivery.data, channel.reply)
    return "success"


async def _end(events: Inbox) -> str:
    """Read events up to the one that ends the answer."""
    while True:
        delivery = await events.next(ANSWER_SECONDS)
        if code := delivery.headers.get(ERROR_CODE):  # of nats-py: the handler raised
            return code
        event: Any = decode(delivery.data, EVENT)
        if isinstance(event, Done | Failed):
            return "success" if isinstance(event, Done) else event.code
