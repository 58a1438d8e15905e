"""
Generate docs/asyncapi.yaml, which describes the bus, from the types of services/contract.

`--check` only reports whether it is stale. Format: https://www.asyncapi.com/docs/reference
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deploy.generated import write_or_check
from services.contract import embeddings, fleet, history, messages, subjects, tokens, usage
from services.contract.version import VERSION

PATH = Path("docs/asyncapi.yaml")
HEAD = "# Generated from services/contract by `just lock`: change the types, not this file.\n"
PARAMETERS = {
    "tenant": "name of the API key, or `_` without API keys",
    "request": "request id",
    "attempt": "any token; every attempt at a request has another one",
    "edge": "id of an edge process",
    "worker": "worker id, as in its reports",
    "session": "base64url of the session id, without padding",
}
T, R, W = "{tenant}", "{request}", "{worker}"


class Channel(NamedTuple):
    """A subject, and the types of its messages and replies. `is_sent`: by services."""

    name: str
    subject: str
    summary: str
    message: Any
    reply: Any = None
    is_sent: bool = False


CHANNELS = (
    Channel("chat", subjects.request(subjects.OPEN_TENANT),
            "Chat request of the open tenant. Its events go to the reply subject, an inbox.",
            messages.ChatRequest, messages.StreamEvent),
    Channel("tenantChat", subjects.request(T), "Chat request of a tenant.",
            messages.ChatRequest, messages.StreamEvent),
    Channel("workerChat", subjects.worker_request(W, T), "Chat request to one worker. Its events"
            f" go to the subject in the header {subjects.REPLY_HEADER}.",
            messages.ChatRequest, messages.RequestAdmitted),
    Channel("events", subjects.reply(T, R, "{attempt}"), "Events of an answer.",
            messages.StreamEvent, is_sent=True),
    Channel("cancel", subjects.cancel(T, R), "End an answer.", messages.Cancel),
    Channel("erased", subjects.erased(T), "A session was erased: workers drop its answers.",
            messages.SessionErased, is_sent=True),
    Channel("replay", subjects.replay(T, R), "Events of an answer again, from an offset on.",
            messages.ReplayRequest, messages.Replay),
    Channel("workerReplay", subjects.worker_replay(W, T, R), "The same from one worker.",
            messages.ReplayRequest, messages.Replay),
    Channel("report", subjects.report(W), "State of a worker, every one or two seconds.",
            messages.WorkerReport, is_sent=True),
    Channel("hub", subjects.hub(W), "A worker that hears all reports, every five seconds and"
            " when that changes.",
            fleet.HubAnnouncement, is_sent=True),
    Channel("reports", subjects.reports(W), "The reports that such a worker has heard.",
            messages.Empty, fleet.FleetReports),
    Channel("tokenize", subjects.tokenize(W, T), "Tokenize a text.",
            tokens.TokenizeRequest, tokens.TokenizeReply),
    Channel("detokenize", subjects.detokenize(W, T), "Turn tokens into text.",
            tokens.DetokenizeRequest, tokens.DetokenizeReply),
    Channel("count", subjects.count(W, T), "Count the tokens of a conversation's prompt.",
            messages.ChatRequest, tokens.TokenCount),
    Channel("embed", subjects.embed_request(subjects.OPEN_TENANT),
            "Embeddings of texts for the open tenant, by any worker with such a model.",
            embeddings.EmbedRequest, embeddings.Embeddings),
    Channel("tenantEmbed", subjects.embed_request(T), "The same for a tenant.",
            embeddings.EmbedRequest, embeddings.Embeddings),
    Channel("workerEmbed", subjects.embed(W, T), "The same from one worker.",
            embeddings.EmbedRequest, embeddings.Embeddings),
    Channel("rerank", subjects.rerank_request(subjects.OPEN_TENANT),
            "Relevance of documents for the open tenant, by any worker with a reranker.",
            embeddings.RerankRequest, embeddings.Scores),
    Channel("tenantRerank", subjects.rerank_request(T), "The same for a tenant.",
            embeddings.RerankRequest, embeddings.Scores),
    Channel("workerRerank", subjects.rerank(W, T), "The same from one worker.",
            embeddings.RerankRequest, embeddings.Scores),
    Channel("context", subjects.history("context", T), "Exchanges of a session for its prompt.",
            history.ContextRequest, history.ContextReply),
    Channel("messages", subjects.history("messages", T), "Exchanges of a session, or of all.",
            history.MessagesRequest, history.ExchangePage),
    Channel("sessions", subjects.history("sessions", T), "Sessions, most recently active first.",
            history.SessionsRequest, history.SessionPage),
    Channel("exchange", subjects.history("exchange", T), "One exchange by its request id.",
            history.ExchangeRequest, history.Exchange),
    Channel("describe", subjects.history("describe", T), "Set title and system prompt.",
            history.DescribeRequest, history.Session),
    Channel("export", subjects.history("export", T), "Complete exchanges, oldest first.",
            history.ExportRequest, history.ExportPage),
    Channel("import", subjects.history("import", T), "Add exchanges to a session.",
            history.ImportRequest, messages.Empty),
    Channel("feedback", subjects.history("feedback", T), "Rate, correct or prefer an answer.",
            history.FeedbackRequest, history.FeedbackStored),
    Channel("branch", subjects.history("branch", T), "Responses that the next one continues.",
            history.BranchRequest, history.Branch),
    Channel("remove", subjects.history("remove", T), "Delete one response everywhere.",
            history.RemoveRequest, messages.Empty),
    Channel("clear", subjects.history("clear", T), "Clear the context of a session.",
            history.ClearRequest, messages.Empty),
    Channel("delete", subjects.history("delete", T), "Erase a session everywhere.",
            history.DeleteRequest, messages.Empty),
    Channel("historyStatus", subjects.HISTORY_STATUS, "State of history.",
            messages.Empty, history.HistoryStatus),
    Channel("historyAppendFailed", subjects.HISTORY_APPEND_FAILED,
            "An append failed: history probes the log.", messages.Empty),
    Channel("usage", subjects.usage("{edge}"), "What tenants with limits use at an edge.",
            usage.EdgeUsage, is_sent=True),
    Channel("log", subjects.log(f"{T}.{{session}}"), "The log, a JetStream stream"
            f" {subjects.HISTORY_STREAM}. Only the services append to it.",
            history.LogRecord, is_sent=True),
)  # fmt: skip


def document() -> dict[str, Any]:
    """Return the AsyncAPI 3 document, from the services' point of view."""
    kinds = [kind for channel in CHANNELS for kind in (channel.message, channel.reply) if kind]
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
    if channel.reply:
        reply = {"message": {"payload": schema_of[str(channel.reply)]}}
        yield f"{channel.name}Reply", {"address": None, "messages": reply}


def _operation(channel: Channel) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": "send" if channel.is_sent else "receive",
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "summary": channel.summary,
    }
    if channel.reply:
        operation["reply"] = {"channel": {"$ref": f"#/channels/{channel.name}Reply"}}
    return operation


def _names(subject: str) -> list[str]:
    return re.findall(r"\{(\w+)}", subject)


def yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Yield lines in block style. Scalars are JSON, which is valid YAML."""
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
    "Subjects and messages of the bus, explained in docs/bus.md. The reply to a request that failed"
    " has no payload and the headers Nats-Service-Error-Code and Nats-Service-Error. A request"
    " without a subscriber gets NATS's status 503."
)


def text() -> str:
    return HEAD + "\n".join(yaml(document())) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PATH: text()}, sys.argv))
