"""Every subject on the bus is made here. Knows how names are spelled, not what is sent to them."""

import base64
import re

from services.contract.errors import ServiceError

OPEN_TENANT = "_"
"""The tenant of a deployment without API keys."""

REQUEST = "chat.request"
"""
Where anyone asks: the open tenant. Other tenants have a subject of their own, so that NATS
permissions can hold them.
"""
REQUEST_ANY_TENANT = "chat.request.*"
CANCEL_ANY = "chat.cancel.*.*"
REPLAY_ANY = "chat.replay.*.*"
ERASED_ANY = "chat.erased.*"
REPORT_ANY = "chat.worker.*.report"
REPLY_HEADER = "Chat-Reply"
"""On a request to one worker: the reply subject of the caller, who waits for events there."""

HISTORY_STREAM = "HISTORY"
HISTORY_LOG = "history.log.>"
HISTORY_REPAIR_STREAM = "HISTORY_REPAIR"
HISTORY_REPAIR = "history.repair.>"
HISTORY_REPAIR_RECORDS = "history.repair.record.>"
HISTORY_REPAIR_SNAPSHOTS = "history.repair.snapshot.>"
HISTORY_REPAIR_LOCK = "history.repair.lock"
HISTORY_REPAIR_EMPTIED = "history.repair.emptied"
HISTORY_PROBE = "history.log.probe"
"""Subject of the probe with which history tests the log; no session has it."""
HISTORY_STATUS = "history.status"
HISTORY_APPEND_FAILED = "history.append_failed"
"""Subject on which workers report a failed append to history."""
HISTORY_CONTEXT_ANY = "history.context.*"
HISTORY_MESSAGES_ANY = "history.messages.*"
HISTORY_CLEAR_ANY = "history.clear.*"
HISTORY_DELETE_ANY = "history.delete.*"
HISTORY_EXCHANGE_ANY = "history.exchange.*"
HISTORY_SESSIONS_ANY = "history.sessions.*"
HISTORY_DESCRIBE_ANY = "history.describe.*"
HISTORY_EXPORT_ANY = "history.export.*"
HISTORY_IMPORT_ANY = "history.import.*"
SESSIONS_BUCKET = "sessions"
REQUESTS_BUCKET = "requests"

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REPLY = re.compile(r"(?:_INBOX\w*|chat\.reply)(?:\.[^\s.*>]+)+", re.ASCII)
MAX_REPLY_LENGTH = 512
"""Characters. nats-server closes the connection of a client that sends a line over 4 KiB."""


def is_id(text: str) -> bool:
    """Whether `text` can be a request id, a tenant or any other single token of a subject."""
    return _ID.fullmatch(text) is not None


def request(tenant: str) -> str:
    return REQUEST if tenant == OPEN_TENANT else f"{REQUEST}.{tenant}"


def tenant_of_request(subject: str) -> str:
    """The tenant that a request on `subject` belongs to."""
    return subject.removeprefix(REQUEST).removeprefix(".") or OPEN_TENANT


def reply(tenant: str, request_id: str, attempt: str) -> str:
    return f"chat.reply.{tenant}.{request_id}.{attempt}"


def attempt_of_reply(subject: str) -> str:
    """Empty where the reply subject is an inbox."""
    return subject.rpartition(".")[2] if subject.startswith("chat.reply.") else ""


def is_reply(subject: str) -> bool:
    """
    Whether a service may publish to the reply subject that a caller named.

    A service may publish where its callers may not (`$JS.API.STREAM.PURGE.HISTORY` purges on any
    message), so only an inbox and `chat.reply.…` are accepted as a reply subject. An inbox may have
    a prefix of its own, `_INBOX_alice.…`, so that NATS permissions can tell callers apart.
    """
    return len(subject) <= MAX_REPLY_LENGTH and _REPLY.fullmatch(subject) is not None


def worker_request(worker_id: str, tenant: str) -> str:
    """Where one worker alone is asked; it acknowledges that it takes the request."""
    return f"chat.worker.{worker_id}.request.{tenant}"


def worker_request_any_tenant(worker_id: str) -> str:
    return worker_request(worker_id, "*")


def tenant_of_worker_request(subject: str) -> str:
    return subject.rsplit(".", 1)[1]


def tokenize(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.tokenize"


def detokenize(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.detokenize"


def count(worker_id: str) -> str:
    """Where one worker is asked how many tokens a request's prompt has."""
    return f"chat.worker.{worker_id}.count"


def cancel(tenant: str, request_id: str) -> str:
    return f"chat.cancel.{tenant}.{request_id}"


def target_of_cancel(subject: str) -> tuple[str, str]:
    """(tenant, request id) of a cancel subject."""
    _, _, tenant, request_id = subject.split(".")
    return tenant, request_id


def erased(tenant: str) -> str:
    """Return the subject that tells all workers that a session of the tenant was erased."""
    return f"chat.erased.{tenant}"


def tenant_of_erased(subject: str) -> str:
    return subject.rsplit(".", 1)[1]


def replay(tenant: str, request_id: str) -> str:
    """All workers hear it, and the one that gives the answer says what it was so far."""
    return f"chat.replay.{tenant}.{request_id}"


def worker_replay(worker_id: str, tenant: str, request_id: str) -> str:
    """The same of one worker, which also says so if it does not know of the request."""
    return f"chat.worker.{worker_id}.replay.{tenant}.{request_id}"


def target_of_replay(subject: str) -> tuple[str, str]:
    """(tenant, request id) of either."""
    *_, tenant, request_id = subject.split(".")
    return tenant, request_id


def undelivered(worker_id: str, key: str, attempt: int, number: int) -> str:
    """
    The reply subject of an event, on which NATS itself says that nobody heard it: `key` is that of
    the request, `attempt` and `number` count the worker's attempts and the attempt's events.
    """
    return f"chat.worker.{worker_id}.undelivered.{key}.{attempt}.{number}"


def undelivered_any(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.undelivered.*.*.*.*"


def undelivered_event(subject: str) -> tuple[str, int, int]:
    """Return (key, attempt, number) of such a subject. Raises ServiceError(invalid_request)."""
    *_, tenant, request_id, attempt, number = subject.split(".")
    if not (attempt + number).isdecimal():
        raise ServiceError("invalid_request", f"Attempt and number must be digits: {subject!r}.")
    return f"{tenant}.{request_id}", int(attempt), int(number)


def report(worker_id: str) -> str:
    return f"chat.worker.{worker_id}.report"


def history_context(tenant: str) -> str:
    return f"history.context.{tenant}"


def history_messages(tenant: str) -> str:
    return f"history.messages.{tenant}"


def history_exchange(tenant: str) -> str:
    return f"history.exchange.{tenant}"


def history_clear(tenant: str) -> str:
    return f"history.clear.{tenant}"


def history_delete(tenant: str) -> str:
    return f"history.delete.{tenant}"


def history_sessions(tenant: str) -> str:
    return f"history.sessions.{tenant}"


def history_describe(tenant: str) -> str:
    return f"history.describe.{tenant}"


def history_export(tenant: str) -> str:
    return f"history.export.{tenant}"


def history_import(tenant: str) -> str:
    return f"history.import.{tenant}"


def retry(subject: str) -> str:
    """
    Where a request to history goes whose first try was not answered: all processes hear it, so that
    one that is frozen, but still in the queue group, is passed over.
    """
    return f"{subject}.any"


def tenant_of_history(subject: str) -> str:
    """Return the third token. Raises ServiceError(invalid_request) if it is no valid tenant."""
    tenant = subject.split(".")[2]
    if not is_id(tenant):
        raise ServiceError("invalid_request", f"{tenant!r} is not a valid tenant.")
    return tenant


def session_key(tenant: str, session_id: str) -> str:
    """
    `<tenant>.<base64url of the session id>`: the end of a log subject, a KV key, the start of
    an archive id.
    """
    encoded = base64.urlsafe_b64encode(session_id.encode()).decode().rstrip("=")
    return f"{tenant}.{encoded}"


def request_entry(tenant: str, request_id: str) -> str:
    """Return the key, in the bucket `requests`, of the entry of a request id."""
    return f"{tenant}.{request_id}"


def idempotency_entry(tenant: str, name: str) -> str:
    """Return the key, in the bucket `requests`, of an Idempotency-Key with the digest `name`."""
    return f"{tenant}.key.{name}"


def log(key: str) -> str:
    """The log subject of the session with this session key."""
    return f"history.log.{key}"


def repair_record(key: str) -> str:
    """Return the subject of a session's records during the repair of the log."""
    return f"history.repair.record.{key}"


def repair_clear(key: str) -> str:
    """Where it is kept which record of the repaired log is the session's last Cleared or Erased."""
    return f"history.repair.clear.{key}"


def repair_snapshot(key: str) -> str:
    """Where a session's snapshot is kept while the bucket of snapshots is emptied."""
    return f"history.repair.snapshot.{key}"


def key_of_repair(subject: str) -> str:
    """The session key of a record or a snapshot."""
    return subject.split(".", 3)[3]


def log_of_tenant(tenant: str) -> str:
    """All of the tenant's log subjects."""
    return f"history.log.{tenant}.>"


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


def key_of_log(subject: str) -> str:
    """The session key that a log subject belongs to."""
    return subject.removeprefix("history.log.")


def session_of_key(key: str) -> tuple[str, str]:
    """Return (tenant, session id) of a session key. Raises ValueError if it is invalid."""
    tenant, encoded = key.split(".")
    if not is_id(tenant):
        raise ValueError(f"{tenant!r} is not a valid tenant")
    padding = "=" * (-len(encoded) % 4)
    return tenant, base64.urlsafe_b64decode(encoded + padding).decode()
