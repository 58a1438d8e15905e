"""
Generate deploy/nats/permissions.conf, the permissions of each user of NATS, from the contract.

`--check` only reports whether the file is stale. Format:
https://docs.nats.io/running-a-nats-service/configuration/securing_nats/authorization
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from deploy.generated import write_or_check
from services.contract import subjects
from services.contract.subjects import ANY, HistoryVerb

PATH = Path("deploy/nats/permissions.conf")
HEAD = """\
# What each user of NATS may publish and subscribe to. users.conf includes this file.
# Generated from deploy/nats/permissions.py by `just lock`: change the table, not this file.
"""
EVERYTHING = ">"
INTERNAL_VERBS: tuple[HistoryVerb, ...] = ("context",)
"""Requests to history that only workers send."""
PUBLIC_VERBS = tuple(verb for verb in get_args(HistoryVerb) if verb not in INTERNAL_VERBS)

READ = ("STREAM.MSG.GET",)
INSPECT = ("STREAM.INFO",)
ENSURE = (*INSPECT, "STREAM.CREATE", "STREAM.UPDATE")
"""
Calls of JetStream's API, which a stream's name follows. ENSURE is for history alone: a stream can
be configured to copy others, and to republish to any subject.
"""


class Permissions(NamedTuple):
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def edge() -> Permissions:
    requests, keys = subjects.REQUESTS_BUCKET, subjects.KEYS_BUCKET
    return Permissions(
        publish=(
            *_asking(ANY),
            *_asking_workers(ANY),
            subjects.reports(ANY),
            *_asking_history(PUBLIC_VERBS, ANY),
            *_with_retry(subjects.HISTORY_STATUS),
            subjects.agent("hb", ANY, ANY),
            subjects.usage(ANY),
            _entry(requests, subjects.idempotency_entry(ANY, ANY)),
            _entry(requests, f"{subjects.background_entries(ANY, ANY)}{ANY}"),
            *_calls(_bucket(requests), *READ, *INSPECT),
            _entry(keys, EVERYTHING),
            *_calls(_bucket(keys), *READ, *INSPECT, "STREAM.PURGE"),
            *_replies("tenant", "admin"),
            f"{subjects.AGENT_CALLERS_INBOX}.>",
        ),
        subscribe=(
            subjects.report(ANY),
            subjects.hub(ANY),
            subjects.reply(ANY, ANY, ANY),
            subjects.agent("prompt", ANY, ANY),
            subjects.agent("status", ANY, ANY),
            subjects.usage(ANY),
            *_discovery("agents"),
            f"{subjects.inbox('edge')}.>",
        ),
    )


def inference() -> Permissions:
    return Permissions(
        publish=(
            subjects.report(ANY),
            subjects.hub(ANY),
            subjects.reports(ANY),
            subjects.reply(ANY, ANY, ANY),
            subjects.worker_request(ANY, ANY),
            subjects.embed(ANY, ANY),
            subjects.rerank(ANY, ANY),
            subjects.cancel(ANY, ANY),
            *_asking_history(INTERNAL_VERBS, ANY),
            subjects.HISTORY_APPEND_FAILED,
            subjects.log(f"{ANY}.{ANY}"),
            *_calls(subjects.HISTORY_STREAM, *READ),
            *_finding("inference"),  # its health check
            *_finding("embedding"),
            *_replies("edge", "inference", "tenant", "admin"),
        ),
        subscribe=(
            subjects.request(subjects.OPEN_TENANT),
            subjects.request(ANY),
            subjects.worker_request(ANY, ANY),
            subjects.worker_replay(ANY, ANY, ANY),
            subjects.undelivered_any(ANY),
            subjects.tokenize(ANY, ANY),
            subjects.detokenize(ANY, ANY),
            subjects.count(ANY, ANY),
            subjects.embed(ANY, ANY),
            subjects.rerank(ANY, ANY),
            *_any_embedder(subjects.OPEN_TENANT),
            *_any_embedder(ANY),
            subjects.report(ANY),
            subjects.hub(ANY),
            subjects.reports(ANY),
            subjects.cancel(ANY, ANY),
            subjects.replay(ANY, ANY),
            subjects.erased(ANY),
            *_discovery("inference"),
            *_discovery("embedding"),
            f"{subjects.inbox('inference')}.>",
        ),
    )


def history() -> Permissions:
    log, copy = subjects.HISTORY_STREAM, subjects.HISTORY_REPAIR_STREAM
    sessions, requests = subjects.SESSIONS_BUCKET, subjects.REQUESTS_BUCKET
    return Permissions(
        publish=(
            subjects.erased(ANY),
            subjects.HISTORY_LOG,
            *_calls(log, *READ, *ENSURE, "STREAM.MSG.DELETE", "STREAM.PURGE"),
            *_consumers(log),
            subjects.HISTORY_REPAIR,
            *_calls(copy, *READ, *ENSURE, "STREAM.MSG.DELETE", "STREAM.DELETE"),
            _entry(sessions, EVERYTHING),
            *_calls(_bucket(sessions), *READ, *ENSURE, "STREAM.PURGE"),
            *_pulling(_bucket(sessions)),  # to count them
            _entry(requests, subjects.request_entry(ANY, ANY)),
            *_calls(_bucket(requests), *READ, *ENSURE),
            *_calls(_bucket(subjects.KEYS_BUCKET), *ENSURE),
            *_finding("history"),  # its health check
            *_replies("edge", "inference", "history", "tenant", "admin"),
        ),
        subscribe=(
            *_asking_history(get_args(HistoryVerb), ANY),
            *_with_retry(subjects.HISTORY_STATUS),
            subjects.HISTORY_APPEND_FAILED,
            *_discovery("history"),
            f"{subjects.inbox('history')}.>",
        ),
    )


def caller(tenant: str) -> Permissions:
    """
    Return the permissions of a program that talks to the services over NATS as the tenant.

    The SDKs of the agent protocol share one inbox, and find the agents of all tenants, which are
    named after them. So they are for the open tenant alone; callers of others prompt their agent
    with a client of their own.
    """
    is_open = tenant == subjects.OPEN_TENANT
    return Permissions(
        publish=(
            *_asking(tenant),
            *_asking_workers(tenant),
            *_any_embedder(tenant),
            *_asking_history(PUBLIC_VERBS, tenant),
            subjects.agent("prompt", tenant, ANY),
            subjects.agent("status", tenant, ANY),
            *((*_finding("agents"), *_finding(f"agents.{ANY}")) if is_open else ()),
        ),
        subscribe=(
            subjects.report(ANY),
            subjects.reply(tenant, ANY, ANY),
            subjects.agent("hb", tenant, ANY),
            f"{subjects.tenant_inbox(tenant)}.>",
            *(_hearing_agents() if is_open else ()),
        ),
    )


ADMIN = Permissions((EVERYTHING,), (EVERYTHING,))
"""Operators: backups, `nats stream edit`, `just keys`."""


def _asking(tenant: str) -> Iterator[str]:
    """Yield the subjects of a caller that has an answer generated."""
    if tenant in (ANY, subjects.OPEN_TENANT):
        yield subjects.request(subjects.OPEN_TENANT)
    if tenant != subjects.OPEN_TENANT:
        yield subjects.request(tenant)
    yield subjects.worker_request(ANY, tenant)
    yield subjects.cancel(tenant, ANY)
    yield subjects.replay(tenant, ANY)
    yield subjects.worker_replay(ANY, tenant, ANY)


def _asking_workers(tenant: str) -> Iterator[str]:
    """Yield the subjects of requests to one worker that are no chats."""
    yield subjects.tokenize(ANY, tenant)
    yield subjects.detokenize(ANY, tenant)
    yield subjects.count(ANY, tenant)
    yield subjects.embed(ANY, tenant)
    yield subjects.rerank(ANY, tenant)


def _any_embedder(tenant: str) -> tuple[str, str]:
    return subjects.embed_request(tenant), subjects.rerank_request(tenant)


def _asking_history(verbs: Iterable[HistoryVerb], tenant: str) -> Iterator[str]:
    for verb in verbs:
        yield from _with_retry(subjects.history(verb, tenant))


def _with_retry(subject: str) -> tuple[str, str]:
    return subject, subjects.retry(subject)


def _replies(*users: str) -> Iterator[str]:
    """
    Yield the inboxes to which a service replies. `allow_responses` would be wider: it allows the
    reply subject that a request names, whatever it is, and forbids the reply to a request that
    another worker forwarded.
    """
    for user in users:
        yield f"{subjects.inbox(user)}.>"


def _finding(service: str) -> Iterator[str]:
    yield f"$SRV.PING.{service}"
    yield f"$SRV.INFO.{service}"


def _discovery(service: str) -> Iterator[str]:
    """
    Yield the subjects on which a NATS service is found.

    https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-32.md
    """
    for verb in ("PING", "INFO", "STATS"):
        yield f"$SRV.{verb}"
        yield f"$SRV.{verb}.{service}"
        yield f"$SRV.{verb}.{service}.{ANY}"


def _hearing_agents() -> Iterator[str]:
    yield subjects.AGENT_HEARTBEATS
    yield f"{subjects.AGENT_CALLERS_INBOX}.>"


def _calls(stream: str, *calls: str) -> Iterator[str]:
    for call in calls:
        yield f"$JS.API.{call}.{stream}"


def _consumers(stream: str) -> Iterator[str]:
    """Yield what it takes to create, use and delete durable pull consumers."""
    yield from _pulling(stream)
    yield f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{ANY}"
    yield f"$JS.ACK.{stream}.>"


def _pulling(stream: str) -> Iterator[str]:
    """Yield what it takes to create, use and delete pull consumers without acknowledgements."""
    yield f"$JS.API.CONSUMER.CREATE.{stream}.>"
    for call in ("INFO", "DELETE", "MSG.NEXT"):
        yield f"$JS.API.CONSUMER.{call}.{stream}.{ANY}"


def _bucket(name: str) -> str:
    """Return the stream of a key-value bucket."""
    return f"KV_{name}"


def _entry(bucket: str, key: str) -> str:
    """Return the subject that writes a key, or a pattern of keys."""
    return f"$KV.{bucket}.{key}"


USERS: dict[str, Permissions] = {
    "edge": edge(),
    "inference": inference(),
    "history": history(),
    "admin": ADMIN,
    "client": caller(subjects.OPEN_TENANT),
}
"""The users of every installation. `client` is for `just chat` and programs without a tenant."""


def block(permissions: Permissions) -> str:
    """Return the permissions in the format of nats-server."""
    return "\n".join(
        [
            "{",
            f"  publish: {{ allow: [{_lines(permissions.publish)}] }}",
            f"  subscribe: {{ allow: [{_lines(permissions.subscribe)}] }}",
            "}",
        ]
    )


def _lines(patterns: Iterable[str]) -> str:
    return "".join(f'\n    "{pattern}"' for pattern in sorted(set(patterns))) + "\n  "


def text() -> str:
    variables = (f"{name.upper()} = {block(each)}" for name, each in USERS.items())
    return HEAD + "\n" + "\n\n".join(variables) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PATH: text()}, sys.argv))
