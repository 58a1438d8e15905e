"""Each user of NATS may do what it needs, and nothing else: every subject on real nats-servers."""

import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from nats.aio.msg import Msg

from deploy.nats import permissions
from services.contract import subjects
from services.runtime.bus import Bus
from tests.secured import SecuredServer
from tests.servers import NATS_VERSIONS, NatsVersion, running

ANN, BOB, OPEN = "ann", "bob", subjects.OPEN_TENANT
SERVICES = frozenset({"edge", "inference", "history"})
USERS = (*SERVICES, "client", "tenant-ann")
KEY = subjects.session_key(BOB, "s")

NOBODY: frozenset[str] = frozenset()
EDGE, INFERENCE, HISTORY, CLIENT, TENANT = map(
    lambda user: frozenset({user}), ("edge", "inference", "history", "client", "tenant-ann")
)
CALLERS = CLIENT | TENANT


class Rule(NamedTuple):
    """Who may publish to a subject and who may subscribe to it, besides the admin."""

    name: str  # of what builds it, in `subjects`
    subject: str
    publishers: frozenset[str]
    subscribers: frozenset[str] = NOBODY


def requests_to_history() -> Iterator[Rule]:
    for verb in permissions.PUBLIC_VERBS:
        for tenant, callers in ((ANN, TENANT), (BOB, NOBODY), (OPEN, CLIENT)):
            subject = subjects.history(verb, tenant)
            yield Rule("history", subject, EDGE | callers, HISTORY)
            yield Rule("retry", subjects.retry(subject), EDGE | callers, HISTORY)
    context = subjects.history("context", ANN)
    yield Rule("history", context, INFERENCE, HISTORY)
    yield Rule("retry", subjects.retry(context), INFERENCE, HISTORY)
    yield Rule("HISTORY_STATUS", subjects.HISTORY_STATUS, EDGE, HISTORY)
    yield Rule("HISTORY_APPEND_FAILED", subjects.HISTORY_APPEND_FAILED, INFERENCE, HISTORY)


def requests_of(tenant: str, callers: frozenset[str]) -> Iterator[Rule]:
    """Yield the subjects of a tenant's answers."""
    asking = EDGE | callers
    yield Rule("request", subjects.request(tenant), asking, INFERENCE)
    direct = subjects.worker_request("w", tenant)
    yield Rule("worker_request", direct, asking | INFERENCE, INFERENCE)
    yield Rule("reply", subjects.reply(tenant, "r", "1"), INFERENCE, asking)
    yield Rule("cancel", subjects.cancel(tenant, "r"), asking | INFERENCE, INFERENCE)
    yield Rule("replay", subjects.replay(tenant, "r"), asking, INFERENCE)
    yield Rule("worker_replay", subjects.worker_replay("w", tenant, "r"), asking, INFERENCE)
    for name in ("tokenize", "detokenize", "count"):
        yield Rule(name, getattr(subjects, name)("w", tenant), asking, INFERENCE)
    for name in ("embed", "rerank"):
        yield Rule(name, getattr(subjects, name)("w", tenant), asking | INFERENCE, INFERENCE)
    for name in ("embed_request", "rerank_request"):
        yield Rule(name, getattr(subjects, name)(tenant), callers, INFERENCE)
    yield Rule("erased", subjects.erased(tenant), HISTORY, INFERENCE)
    yield Rule("agent", subjects.agent("prompt", tenant, "s"), callers, EDGE)
    yield Rule("agent", subjects.agent("status", tenant, "s"), callers, EDGE)
    yield Rule("agent", subjects.agent("hb", tenant, "s"), EDGE, callers | CLIENT)
    inbox = f"{subjects.tenant_inbox(tenant)}.x.y"
    yield Rule("tenant_inbox", inbox, SERVICES, callers)


def requests_to_workers() -> Iterator[Rule]:
    yield Rule("report", subjects.report("w"), INFERENCE, EDGE | INFERENCE | CALLERS)
    yield Rule("hub", subjects.hub("w"), INFERENCE, EDGE | INFERENCE)
    yield Rule("reports", subjects.reports("w"), EDGE | INFERENCE, INFERENCE)
    undelivered = subjects.undelivered("w", "ann.r", 1, 1)
    yield Rule("undelivered", undelivered, NOBODY, INFERENCE)
    yield Rule("undelivered_any", subjects.undelivered_any("w"), NOBODY, INFERENCE)
    yield Rule("usage", subjects.usage("e"), EDGE, EDGE)


def inboxes() -> Iterator[Rule]:
    for user, replying in (
        ("edge", INFERENCE | HISTORY),
        ("inference", INFERENCE | HISTORY),
        ("history", HISTORY),
    ):
        inbox = f"{subjects.inbox(user)}.x.y"
        yield Rule("inbox", inbox, replying, frozenset({user}))
    yield Rule("inbox", f"{subjects.inbox('admin')}.x.y", SERVICES)
    yield Rule("AGENT_CALLERS_INBOX", f"{subjects.AGENT_CALLERS_INBOX}.x.y", EDGE, CLIENT)
    yield Rule("INBOX", f"{subjects.INBOX}.x.y", NOBODY)
    yield Rule("INBOX", f"{subjects.INBOX}.>", NOBODY)


def stored() -> Iterator[Rule]:
    """Yield the subjects of JetStream, to which nobody subscribes: services read by requests."""
    yield Rule("log", subjects.log(KEY), INFERENCE | HISTORY)
    yield Rule("log_of_tenant", subjects.log_of_tenant(ANN), HISTORY)
    yield Rule("HISTORY_LOG", subjects.HISTORY_LOG, HISTORY)
    yield Rule("HISTORY_PROBE", subjects.HISTORY_PROBE, HISTORY)
    for name in ("repair_record", "repair_clear", "repair_feedback", "repair_snapshot"):
        yield Rule(name, getattr(subjects, name)(KEY), HISTORY)
    for name in dir(subjects):
        if name in REPAIR:
            yield Rule(name, getattr(subjects, name), HISTORY)
    sessions, requests, keys = (f"$KV.{bucket}." for bucket in ("sessions", "requests", "keys"))
    yield Rule("snapshot_entry", sessions + subjects.snapshot_entry(KEY), HISTORY)
    yield Rule("request_entry", requests + subjects.request_entry(ANN, "r"), HISTORY)
    yield Rule("idempotency_entry", requests + subjects.idempotency_entry(ANN, "d"), EDGE)
    background = subjects.background_entry(ANN, "0" * 64)
    yield Rule("background_entry", requests + background, EDGE)
    yield Rule("KEYS_BUCKET", f"{keys}digest", EDGE)


REPAIR = (
    "HISTORY_REPAIR",
    "HISTORY_REPAIR_RECORDS",
    "HISTORY_REPAIR_SNAPSHOTS",
    "HISTORY_REPAIR_LOCK",
    "HISTORY_REPAIR_EMPTIED",
)


def calls_of_jetstream() -> Iterator[Rule]:
    """
    Yield calls of JetStream's API.

    https://docs.nats.io/reference/reference-protocols/nats_api_reference
    """
    reading = {
        "HISTORY": INFERENCE | HISTORY,
        "HISTORY_RESCUED": HISTORY,
        "KV_sessions": HISTORY,
        "KV_requests": EDGE | HISTORY,
        "KV_keys": EDGE,
    }
    for stream, readers in reading.items():
        call = partial("$JS.API.STREAM.{}.{stream}".format, stream=stream)
        yield Rule("HISTORY_STREAM", call("MSG.GET"), readers)
        yield Rule("HISTORY_STREAM", call("CREATE"), HISTORY)
        yield Rule("HISTORY_STREAM", call("UPDATE"), HISTORY)
        is_inspected = stream in ("KV_requests", "KV_keys")
        yield Rule("HISTORY_STREAM", call("INFO"), HISTORY | (EDGE if is_inspected else NOBODY))
        purging = {"HISTORY": HISTORY, "KV_sessions": HISTORY, "KV_keys": EDGE}
        yield Rule("HISTORY_STREAM", call("PURGE"), purging.get(stream, NOBODY))
        is_copy = stream == "HISTORY_RESCUED"
        yield Rule("HISTORY_REPAIR_STREAM", call("DELETE"), HISTORY if is_copy else NOBODY)
        deleting = HISTORY if stream in ("HISTORY", "HISTORY_RESCUED") else NOBODY
        yield Rule("HISTORY_STREAM", call("MSG.DELETE"), deleting)
        yield Rule("HISTORY_STREAM", call("SNAPSHOT"), NOBODY)
        yield Rule("HISTORY_STREAM", call("RESTORE"), NOBODY)
        consuming = HISTORY if stream == "HISTORY" else NOBODY
        pulling = HISTORY if stream in ("HISTORY", "KV_sessions") else NOBODY
        for of_consumer in ("CREATE", "INFO", "DELETE", "MSG.NEXT"):
            subject = f"$JS.API.CONSUMER.{of_consumer}.{stream}.c"
            yield Rule("HISTORY_STREAM", subject, pulling)
        subject = f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.c"
        yield Rule("HISTORY_STREAM", subject, consuming)
        yield Rule("HISTORY_STREAM", f"$JS.ACK.{stream}.archive.1.1.1.1.0", consuming)
        yield Rule("HISTORY_STREAM", f"$JS.API.DIRECT.GET.{stream}", NOBODY)
    for other in ("INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.CREATE.OTHER"):
        yield Rule("HISTORY_STREAM", f"$JS.API.{other}", NOBODY)


def discovery() -> Iterator[Rule]:
    for verb in ("PING", "INFO", "STATS"):
        is_asked = verb != "STATS"
        own = {"agents": CLIENT if is_asked else NOBODY}
        own |= {name: frozenset({name}) for name in ("history", "inference") if verb == "INFO"}
        own |= {"embedding": INFERENCE if is_asked else NOBODY}
        yield Rule("agent", f"$SRV.{verb}", NOBODY, SERVICES)
        for service, user in (
            ("agents", EDGE),
            ("inference", INFERENCE),
            ("embedding", INFERENCE),
            ("history", HISTORY),
        ):
            asking = own.get(service, NOBODY)
            if service in ("history", "inference") and verb == "PING":
                asking = frozenset({service})
            yield Rule("agent", f"$SRV.{verb}.{service}", asking, user)
            is_agent = service == "agents" and is_asked
            yield Rule("agent", f"$SRV.{verb}.{service}.id", CLIENT if is_agent else NOBODY, user)


def rules() -> list[Rule]:
    others = (
        Rule("HISTORY_LOG", ">", NOBODY),
        Rule("HISTORY_LOG", "$SYS.REQ.SERVER.PING", NOBODY),
        Rule("AGENT", "agents.>", NOBODY),
        Rule("AGENT_HEARTBEATS", subjects.AGENT_HEARTBEATS, NOBODY, CLIENT),
        Rule("reply", "chat.>", NOBODY),
    )
    return [
        *requests_of(ANN, TENANT),
        *requests_of(BOB, NOBODY),
        *requests_of(OPEN, CLIENT),
        *requests_to_history(),
        *requests_to_workers(),
        *inboxes(),
        *stored(),
        *calls_of_jetstream(),
        *discovery(),
        *others,
    ]


NOT_SUBJECTS = {
    "OPEN_TENANT": "a tenant",
    "ANY": "a wildcard",
    "REPLY_HEADER": "a header",
    "MAX_REPLY_LENGTH": "a number",
    "SESSIONS_BUCKET": "in snapshot_entry",
    "REQUESTS_BUCKET": "in request_entry",
    "background_entries": "in background_entry",
    "session_key": "in log",
    "HistoryVerb": "a type",
}
PARSERS = (
    "is_",
    "require_",
    "may_",
    "asking_",
    "tenant_of",
    "attempt_of",
    "session_of",
    "target_of",
    "key_of",
)


def test_every_subject_of_the_contract_has_a_rule() -> None:
    """A new function or constant in subjects.py needs a rule here, and a line in the table."""
    own = {
        name
        for name, value in vars(subjects).items()
        if not name.startswith("_")
        and (isinstance(value, str | int) or inspect.getmodule(value) is subjects)
        and not name.startswith(PARSERS)
    }
    own -= {"undelivered_event", "matches"}
    assert own - NOT_SUBJECTS.keys() == {rule.name for rule in rules()}


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_each_user_may_do_what_it_needs_only(version: NatsVersion, tmp_path: Path) -> None:
    server = SecuredServer(tmp_path, version)
    server.secrets.add_tenant(ANN)
    with running(server):
        for user in USERS:
            allowed = {
                *(("publish", rule.subject) for rule in rules() if user in rule.publishers),
                *(("sub", rule.subject) for rule in rules() if user in rule.subscribers),
            }
            refused = {(how, subject.lower()) for how, subject in operations() - allowed}
            assert await refusals(server, user) == refused, user
        assert await refusals(server, "admin") == set()
    assert len(server.violations()) > len(operations()), "tests/e2e looks for these lines"


def operations() -> set[tuple[str, str]]:
    """Return (verb, subject) of all that is tried; nothing can be published to a wildcard."""
    published = {rule.subject for rule in rules() if not set(rule.subject) & set("*>")}
    subscribed = {rule.subject for rule in rules()}
    return {("publish", each) for each in published} | {("sub", each) for each in subscribed}


async def refusals(server: SecuredServer, user: str) -> set[tuple[str, str]]:
    """Return the operations that the server refuses, their subjects in lower case as of nats-py."""
    refused = set()

    async def note(error: Exception) -> None:
        violation = re.search('permissions violation for (publish|sub).* to "(.*)"', str(error))
        assert violation, error
        refused.add((violation[1], violation[2]))

    async def ignore(_: Msg) -> None:
        pass

    async with Bus.connect(server.url, "test", server.access(user)) as bus:
        bus._client._error_cb = note
        for how, subject in sorted(operations()):
            if how == "publish":
                await bus._client.publish(subject)
            else:
                await bus._client.subscribe(subject, cb=ignore)
        assert await bus.is_responsive()
    return refused


def test_permissions_file_is_fresh() -> None:
    assert permissions.PATH.read_text("utf-8") == permissions.text()
