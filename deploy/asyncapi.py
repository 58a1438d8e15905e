"""
docs/asyncapi.yaml from the types of services/contract, for who publishes to NATS with other tools;
--check only says if it is stale.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deploy.generated import write_or_check
from services.contract import history, messages, subjects, tokens
from services.contract.version import VERSION

PATH = Path("docs/asyncapi.yaml")
HEAD = "# Made from services/contract by `just lock`: change the types, not this file.\n"
PARAMETERS = {
    "tenant": "`_` without API keys, else the name of the key",
    "request": "the request's id",
    "attempt": "any token; each time that a request is sent has another",
    "worker": "the id of a worker, as its reports tell it",
    "session": "base64url of the session id, without padding",
}
T, R, W = "{tenant}", "{request}", "{worker}"


class Channel(NamedTuple):
    """
    A subject, what is sent to it and what comes back; `is_told`: by the services, to whoever
    listens.
    """

    name: str
    subject: str
    summary: str
    message: Any
    answer: Any = None
    is_told: bool = False


CHANNELS = (
    Channel("ask", subjects.request(subjects.OPEN_TENANT), "Ask a worker, as the open tenant."
            " Its events go to the reply subject, an inbox.",
            messages.ChatRequest, messages.StreamEvent),
    Channel("askAsTenant", subjects.request(T), "The same, as a tenant.",
            messages.ChatRequest, messages.StreamEvent),
    Channel("askWorker", subjects.worker_request(W, T), "Ask one worker. The events go to the"
            f" subject in the header {subjects.REPLY_HEADER}.",
            messages.ChatRequest, messages.RequestAdmitted),
    Channel("events", subjects.reply(T, R, "{attempt}"), "The events of an answer.",
            messages.StreamEvent, is_told=True),
    Channel("cancel", subjects.cancel(T, R), "End an answer.", messages.Cancel),
    Channel("erased", subjects.erased(T), "A session was erased: workers forget its answers.",
            messages.SessionErased, is_told=True),
    Channel("replay", subjects.replay(T, R), "An answer again, from a character on.",
            messages.ReplayRequest, messages.Replay),
    Channel("replayOfWorker", subjects.worker_replay(W, T, R), "The same, of one worker.",
            messages.ReplayRequest, messages.Replay),
    Channel("report", subjects.report(W), "How a worker is, once a second.",
            messages.WorkerReport, is_told=True),
    Channel("tokenize", subjects.tokenize(W), "A text as tokens.",
            tokens.TokenizeRequest, tokens.TokenizeReply),
    Channel("detokenize", subjects.detokenize(W), "Tokens as text.",
            tokens.DetokenizeRequest, tokens.DetokenizeReply),
    Channel("count", subjects.count(W), "The tokens that the prompt of a conversation has.",
            messages.ChatRequest, tokens.TokenCount),
    Channel("context", subjects.history("context", T), "What the model is shown of a session.",
            history.ContextRequest, history.Context),
    Channel("messages", subjects.history("messages", T), "The exchanges of a session, or of all.",
            history.MessagesRequest, history.ExchangePage),
    Channel("sessions", subjects.history("sessions", T), "The sessions, the last active first.",
            history.SessionsRequest, history.SessionPage),
    Channel("exchange", subjects.history("exchange", T), "One exchange, by its request's id.",
            history.ExchangeRequest, history.Exchange),
    Channel("describe", subjects.history("describe", T), "A session's title and system prompt.",
            history.DescribeRequest, history.Session),
    Channel("export", subjects.history("export", T), "Whole exchanges, the oldest first.",
            history.ExportRequest, history.ExportPage),
    Channel("import", subjects.history("import", T), "Exchanges are put into a session.",
            history.ImportRequest, messages.Empty),
    Channel("clear", subjects.history("clear", T), "A session's context is forgotten.",
            history.ClearRequest, messages.Empty),
    Channel("delete", subjects.history("delete", T), "A session is erased everywhere.",
            history.DeleteRequest, messages.Empty),
    Channel("historyStatus", subjects.HISTORY_STATUS, "How history is.",
            messages.Empty, history.HistoryStatus),
    Channel("historyAppendFailed", subjects.HISTORY_APPEND_FAILED,
            "An append failed: history probes the log.", messages.Empty),
    Channel("log", subjects.log(f"{T}.{{session}}"), "The log, a JetStream stream"
            f" {subjects.HISTORY_STREAM}. Only the services append to it.",
            history.LogRecord, is_told=True),
)  # fmt: skip


def document() -> dict[str, Any]:
    """AsyncAPI 3, as the services see it: what they receive and what they send."""
    kinds = [kind for channel in CHANNELS for kind in (channel.message, channel.answer) if kind]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(str, kinds), schemas, strict=True))
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "FineTuneLLM", "version": VERSION, "description": _ABOUT},
        "defaultContentType": "application/json",
        "channels": {
            key: content for channel in CHANNELS for key, content in _channels(channel, schema_of)
        },
        "operations": {channel.name: _operation(channel) for channel in CHANNELS},
        "components": {"schemas": components},
    }


def _channels(channel: Channel, schema_of: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    found = {name: {"description": PARAMETERS[name]} for name in _names(channel.subject)}
    yield (
        channel.name,
        {
            "address": channel.subject,
            "description": channel.summary,
            **({"parameters": found} if found else {}),
            "messages": {"message": {"payload": schema_of[str(channel.message)]}},
        },
    )
    if channel.answer:
        answer = {"message": {"payload": schema_of[str(channel.answer)]}}
        yield f"{channel.name}Answer", {"address": None, "messages": answer}


def _operation(channel: Channel) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": "send" if channel.is_told else "receive",
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "summary": channel.summary,
    }
    if channel.answer:
        operation["reply"] = {"channel": {"$ref": f"#/channels/{channel.name}Answer"}}
    return operation


def _names(subject: str) -> list[str]:
    return re.findall(r"\{(\w+)}", subject)


def yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of block style; what has no parts is JSON, which is YAML."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _entry(f"{indent}{_key(key)}:", item, indent)
    elif isinstance(value, list | tuple) and value:
        for item in value:
            yield from _entry(f"{indent}-", item, indent)
    else:
        yield indent + json.dumps(value, ensure_ascii=False)


def _entry(start: str, item: Any, indent: str) -> Iterator[str]:
    if isinstance(item, dict | list | tuple) and item:
        yield start
        yield from yaml(item, indent + "  ")
    else:
        yield f"{start} {json.dumps(item, ensure_ascii=False)}"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z][\w.-]*", key) else json.dumps(key)


_ABOUT = (
    "The subjects and messages of docs/bus.md. A request that fails is answered with an empty"
    " payload and the headers Nats-Service-Error-Code and Nats-Service-Error; one that nobody"
    " answers with NATS's own status 503."
)


def text() -> str:
    return HEAD + "\n".join(yaml(document())) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PATH: text()}, sys.argv))
