"""
Build and parse every subject, stream name and key on the bus.

No other module spells a subject. What is sent on each one is in `messages` and `history`.
"""

import base64
import re
from typing import Literal

from services.contract import responses
from services.contract.errors import ServiceError

OPEN_TENANT = "_"
"""The tenant of a deployment without API keys."""

ANY = "*"
"""As a tenant, request id or worker id: makes the pattern that subscribes to all of them."""

REPLY_HEADER = "Chat-Reply"
"""Header of a request to one worker: the subject on which the caller waits for events."""

AGENT = "finetunellm"
"""Name of all our agents in subjects of the Synadia Agent Protocol."""

AGENT_HEARTBEATS = "agents.hb.*.*.*"
"""What callers of agents subscribe to, whichever agents these are."""

HISTORY_STREAM = "HISTORY"
HISTORY_LOG = "history.log.>"
HISTORY_PROBE = "history.log.probe"
"""Subject of the probe with which history tests the log; it belongs to no session."""
HISTORY_STATUS = "history.status"
HISTORY_APPEND_FAILED = "history.append_failed"
"""Subject on which workers report a failed append to history."""
HISTORY_REPAIR_STREAM = "HISTORY_RESCUED"
"""The stream of a repair, which a process of another version may have begun."""
HISTORY_REPAIR = "history.rescued.>"
HISTORY_REPAIR_RECORDS = "history.rescued.record.>"
HISTORY_REPAIR_SNAPSHOTS = "history.rescued.snapshot.>"
HISTORY_REPAIR_LOCK = "history.rescued.lock"
HISTORY_REPAIR_EMPTIED = "history.rescued.emptied"
SESSIONS_BUCKET = "sessions"
REQUESTS_BUCKET = "requests"
KEYS_BUCKET = "keys"
"""The bucket of API keys, which only edges and their operators read."""

INBOX = "_INBOX"
"""The token with which the subjects of replies start, unless NATS_INBOX_PREFIX extends it."""
AGENT_CALLERS_INBOX = "_INBOX.agents"
"""Where every SDK of the agent protocol waits for replies: it can't be set to another prefix."""

HistoryVerb = Literal[
    "branch",
    "clear",
    "context",
    "delete",
    "describe",
    "exchange",
    "export",
    "feedback",
    "import",
    "messages",
    "remove",
    "sessions",
]

_RESPONSES = "=responses."  # no tenant has a `=`
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REPLY = re.compile(r"(?:_INBOX\w*|chat\.reply)(?:\.[^\s.*>]+)+", re.ASCII)
MAX_REPLY_LENGTH = 512
"""Characters. nats-server closes the connection of a client that sends a line over 4 KiB."""


def is_id(text: str) -> bool:
    """Return whether `text` can be a tenant, request id or other single token of a subject."""
    return _ID.fullmatch(text) is not None


def require_request_id(text: str) -> None:
    """Raise ServiceError(not_found): a space or line break would break the NATS connection."""
    if not is_id(text):
        raise ServiceError("not_found", "There is no such request: the request id is invalid.")


def request(tenant: str) -> str:
    """
    Return the subject of chat requests that any worker may take.

    The open tenant has no token, other tenants have one, so that NATS permissions can confine them.
    """
    return "chat.request" if tenant == OPEN_TENANT else f"chat.request.{tenant}"


def embed_request(tenant: str) -> str:
    """Return the subject of requests that any worker with an embedding model may take."""
    return "embed.request" if tenant == OPEN_TENANT else f"embed.request.{tenant}"


def rerank_request(tenant: str) -> str:
    """Return the subject of requests that any worker with a reranker may take."""
    return "rerank.request" if tenant == OPEN_TENANT else f"rerank.request.{tenant}"


def tenant_of_request(subject: str) -> str:
    """Return the tenant of such a subject."""
    return subject.partition(".request")[2].removeprefix(".") or OPEN_TENANT


def reply(tenant: str, request_id: str, attempt: str) -> str:
    """Return the subject on which the events of one attempt at a request are published."""
    return f"chat.reply.{tenant}.{request_id}.{attempt}"


def attempt_of_reply(subject: str) -> str:
    """Return the attempt of a reply subject, or "" if it is an inbox."""
    return subject.rpartition(".")[2] if subject.startswith("chat.reply.") else ""


def inbox(user: str) -> str:
    """Return the prefix of the inboxes of a service or an operator as a user of NATS."""
    return f"{INBOX}.{user}"


def tenant_inbox(tenant: str) -> str:
    """Return the prefix of the inboxes of a tenant's callers."""
    return f"{INBOX}.tenant.{tenant}"


def asking_tenant(subject: str) -> str | None:
    """Return the tenant that the subject of a request names; None if it names none."""
    match subject.split("."):
        case ["chat" | "embed" | "rerank", "request"]:
            return OPEN_TENANT
        case ["chat", "replay", tenant, *_]:
            return tenant
        case ["chat" | "embed" | "rerank", "request", tenant, *_]:
            return tenant
        case ["chat", "worker", _, _, tenant, *_]:
            return tenant
        case ["history", _, tenant, *_]:
            return tenant
        case ["agents", _, _, tenant, *_]:
            return tenant
        case _:
            return None


def may_reply(tenant: str | None, subject: str) -> bool:
    """
    Return whether the answer to a request of the tenant may be sent to this reply subject: not to
    subjects on which another tenant waits, where the tenant itself may not publish. None: a request
    that names no tenant.
    """
    if tenant is None:
        return is_reply(subject)
    others = ("chat.reply.>", f"{tenant_inbox(ANY)}.>")
    own = (reply(tenant, ANY, ANY), f"{tenant_inbox(tenant)}.>")
    is_other = any(matches(pattern, subject) for pattern in others)
    return is_reply(subject) and (not is_other or any(matches(each, subject) for each in own))


def is_reply(subject: str) -> bool:
    """
    Return whether a service may publish to a reply subject that a caller named.

    Services may publish where callers may not (`$JS.API.STREAM.PURGE.HISTORY` purges on any
    message), so only inboxes and `chat.reply.…` are accepted. An inbox may have a prefix such as
    `_INBOX_alice.…`, so that NATS permissions can separate callers.
    """
    return len(subject) <= MAX_REPLY_LENGTH and _REPLY.fullmatch(subject) is not None


def worker_request(worker_id: str, tenant: str) -> str:
    """Return the subject of chat requests to one worker, which replies that it admitted them."""
    return f"chat.worker.{worker_id}.request.{tenant}"


def report(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.report"


def hub(worker_id: str) -> str:
    """Return the subject on which a worker announces that it hears all reports."""
    return f"chat.hub.{worker_id}"


def reports(worker_id: str) -> str:
    """Return the subject on which a hub replies with the reports that it has heard."""
    return f"chat.worker.{worker_id}.reports"


def tokenize(worker_id: str, tenant: str) -> str:
    return f"chat.worker.{worker_id}.tokenize.{tenant}"


def detokenize(worker_id: str, tenant: str) -> str:
    return f"chat.worker.{worker_id}.detokenize.{tenant}"


def count(worker_id: str, tenant: str) -> str:
    """Return the subject on which one worker counts the tokens of a chat request's prompt."""
    return f"chat.worker.{worker_id}.count.{tenant}"


def embed(worker_id: str, tenant: str) -> str:
    return f"chat.worker.{worker_id}.embed.{tenant}"


def rerank(worker_id: str, tenant: str) -> str:
    return f"chat.worker.{worker_id}.rerank.{tenant}"


def agent(verb: Literal["prompt", "status", "hb"], tenant: str, session: str) -> str:
    """Return a subject of the Synadia Agent Protocol; `hb` is for heartbeats."""
    return f"agents.{verb}.{AGENT}.{tenant}.{session}"


def usage(edge_id: str) -> str:
    """Return the subject on which an edge tells the others what its tenants use."""
    return f"edge.usage.{edge_id}"


def session_of_agent(subject: str) -> str:
    return subject.rpartition(".")[2]


def cancel(tenant: str, request_id: str) -> str:
    return f"chat.cancel.{tenant}.{request_id}"


def replay(tenant: str, request_id: str) -> str:
    """Return the subject on which the worker that has the request, if any, replays its events."""
    return f"chat.replay.{tenant}.{request_id}"


def worker_replay(worker_id: str, tenant: str, request_id: str) -> str:
    """Return the subject of replays by one worker, which also replies to unknown requests."""
    return f"chat.worker.{worker_id}.replay.{tenant}.{request_id}"


def target_of(subject: str) -> tuple[str, str]:
    """Return (tenant, request id) of a cancel or replay subject."""
    *_, tenant, request_id = subject.split(".")
    return tenant, request_id


def erased(tenant: str) -> str:
    """Return the subject on which workers learn that a session of the tenant was erased."""
    return f"chat.erased.{tenant}"


def tenant_of(subject: str) -> str:
    """Return the tenant of a subject that ends with it, such as `erased` or `worker_request`."""
    return subject.rpartition(".")[2]


def undelivered(worker_id: str, key: str, admission: int, number: int) -> str:
    """
    Return the reply subject of an event, on which NATS reports that it had no subscriber.

    `key` is the request's (`request_entry`); `admission` is the number under which the worker
    admitted it, `number` counts its events.
    """
    return f"chat.worker.{worker_id}.undelivered.{key}.{admission}.{number}"


def undelivered_any(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.undelivered.*.*.*.*"


def undelivered_event(subject: str) -> tuple[str, int, int]:
    """Return (key, admission, number) of such a subject. Raises ServiceError(invalid_request)."""
    *_, tenant, request_id, admission, number = subject.split(".")
    if not (admission + number).isdecimal():
        raise ServiceError("invalid_request", f"Admission and number must be digits: {subject!r}.")
    return f"{tenant}.{request_id}", int(admission), int(number)


def history(verb: HistoryVerb, tenant: str) -> str:
    """Return the subject of one kind of request to history."""
    return f"history.{verb}.{tenant}"


def tenant_of_history(subject: str) -> str:
    """
    Return the tenant of a request to history, which may be a retry.

    Raises ServiceError(invalid_request) if it is no valid tenant.
    """
    tenant = subject.split(".")[2]
    if not is_id(tenant):
        raise ServiceError("invalid_request", f"{tenant!r} is not a valid tenant.")
    return tenant


def retry(subject: str) -> str:
    """
    Return the subject on which a request to history is retried.

    All processes receive it. A queue group may hand the first try to a process that is frozen.
    """
    return f"{subject}.any"


def session_key(tenant: str, session_id: str) -> str:
    """
    Return `<tenant>.<base64url of the session id>`.

    It ends the log subject of the session, is its KV key and starts the ids of its archived
    exchanges.
    """
    encoded = base64.urlsafe_b64encode(session_id.encode()).decode().rstrip("=")
    return f"{tenant}.{encoded}"


def session_of_key(key: str) -> tuple[str, str]:
    """Return (tenant, session id) of a session key. Raises ValueError if it is invalid."""
    tenant, encoded = key.split(".")
    if not is_id(tenant):
        raise ValueError(f"{tenant!r} is not a valid tenant")
    padding = "=" * (-len(encoded) % 4)
    return tenant, base64.urlsafe_b64decode(encoded + padding).decode()


def is_session_key(key: str) -> bool:
    """Return whether the key is one of a session: anyone may publish to the log's subjects."""
    try:
        session_of_key(key)
    except ValueError:
        return False
    return True


def snapshot_entry(key: str) -> str:
    """
    Return the key, in the bucket `sessions`, of a session's snapshot. Those of `/v1/responses` have
    another first token, so that a tenant's sessions are listed without them.
    """
    _, session_id = session_of_key(key)
    return f"{_RESPONSES}{key}" if responses.is_session(session_id) else key


def key_of_snapshot(entry: str) -> str:
    """Return the session key of a snapshot's key."""
    return entry.removeprefix(_RESPONSES)


def tenant_of_snapshot(subject: str) -> str:
    """Return the tenant of the session whose snapshot is on this subject of its bucket."""
    entry = subject.removeprefix(f"$KV.{SESSIONS_BUCKET}.")
    return key_of_snapshot(entry).partition(".")[0]


def request_entry(tenant: str, request_id: str) -> str:
    """Return the key, in the bucket `requests`, of the entry of a request id."""
    return f"{tenant}.{request_id}"


def idempotency_entry(tenant: str, digest: str) -> str:
    """Return the key, in the bucket `requests`, of the Idempotency-Key with this digest."""
    return f"{tenant}.key.{digest}"


def background_entry(tenant: str, request_id: str) -> str:
    """Return the key, in the bucket `requests`, of a response that is generated in background."""
    tree = responses.tree_of(request_id)
    return f"{background_entries(tenant, tree)}{request_id.removeprefix(tree)}"


def background_entries(tenant: str, tree: str) -> str:
    """Return the prefix of these keys for all responses of a tree."""
    return f"{tenant}.background.{tree}."


def log(key: str) -> str:
    """Return the log subject of the session with this session key."""
    return f"history.log.{key}"


def log_of_tenant(tenant: str) -> str:
    """Return the pattern of all of the tenant's log subjects."""
    return f"history.log.{tenant}.>"


def key_of_log(subject: str) -> str:
    """Return the session key of a log subject."""
    return subject.removeprefix("history.log.")


def repair_record(key: str) -> str:
    """Return the subject of a session's records during the repair of the log."""
    return f"history.rescued.record.{key}"


def repair_clear(key: str) -> str:
    """Return the subject of the number, in the repaired log, of the last Cleared or Erased."""
    return f"history.rescued.clear.{key}"


def repair_feedback(key: str) -> str:
    """Return the subject of the number, in the repaired log, of a session's last feedback."""
    return f"history.rescued.feedback.{key}"


def repair_snapshot(key: str) -> str:
    """Return the subject of a session's snapshot while the bucket of snapshots is emptied."""
    return f"history.rescued.snapshot.{key}"


def key_of_repair(subject: str) -> str:
    """Return the session key of a repair subject."""
    return subject.split(".", 3)[3]


def matches(pattern: str, subject: str) -> bool:
    """Return whether the subject matches the pattern, which may have wildcards."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    pairs = zip(wanted, tokens, strict=False)
    return len(wanted) == len(tokens) and all(w in ("*", t) for w, t in pairs)
