"""The history service on the bus: its endpoints, and how its parts are put together."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from itertools import chain
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from msgspec import Struct, structs
from prometheus_client.core import Metric

from services.contract import history, subjects
from services.contract.errors import ServiceError
from services.contract.messages import Empty
from services.history.admission import Lane
from services.history.archive import Archive, Archiver, ArchiveUnavailable
from services.history.branches import Branches
from services.history.dropping import FairDropper
from services.history.guard import LogGuard
from services.history.limits import (
    LIMITS,
    HistoryLimits,
)
from services.history.log import SessionLog
from services.history.repair import Checkup, LogRepair
from services.history.requests import Indexer
from services.history.retention import BulkRoom, LogQuota, Trimmer
from services.history.session_quota import SessionQuota
from services.history.sessions import Sessions
from services.history.settings import DEFAULT_MONGODB, HistorySettings
from services.history.snapshots import Snapshots, SnapshotSaver
from services.runtime import tracing
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.deliveries import Endpoint
from services.runtime.metrics import (
    history_families,
    history_process_families,
    serving_metrics,
)
from services.runtime.streams import Conflict, Stream, StreamDamaged, StreamFull, StreamUnavailable
from services.runtime.supervised import Fail

SCRAPE_SECONDS = 2.5

Request = TypeVar("Request", bound=Struct)
Reply = TypeVar("Reply", bound=Struct)
LaneName = Literal["chats", "bulk", "imports"]
"""Requests of different lanes don't wait for each other."""


class Access(Enum):
    """What a request needs of the log."""

    READ = auto()
    """Always answered."""
    CHANGE = auto()
    """Waits for a check of the log that is due; rejected while the log can't be used."""
    GROW = auto()
    """Also rejected while the log is nearly full: exchanges will be stored."""
    BULK = auto()
    """Like CHANGE, but waits for room in the log, of which chats keep a part for themselves."""


READ, CHANGE, GROW, BULK = Access


class Route(NamedTuple, Generic[Request, Reply]):
    verb: subjects.HistoryVerb
    request: type[Request]
    reply: type[Reply]
    method: Callable[[str, Request], Awaitable[Reply]]
    access: Access
    lane: LaneName = "bulk"


@dataclass(frozen=True)
class HistoryService:
    bus: Bus
    session_log: SessionLog
    archive: Archive
    sessions: Sessions
    branches: Branches
    quota: LogQuota
    guard: LogGuard
    room: BulkRoom
    dropper: FairDropper
    lanes: Mapping[LaneName, Lane]

    async def serve(self) -> None:
        do = self.sessions
        routes = (
            Route(
                "context",
                history.ContextRequest,
                history.ContextReply,
                self._context,
                GROW,
                "chats",
            ),
            Route("messages", history.MessagesRequest, history.ExchangePage, do.messages, READ),
            Route("sessions", history.SessionsRequest, history.SessionPage, do.list_sessions, READ),
            Route("describe", history.DescribeRequest, history.Session, do.describe, BULK),
            Route(
                "feedback", history.FeedbackRequest, history.FeedbackStored, do.give_feedback, BULK
            ),
            Route("export", history.ExportRequest, history.ExportPage, do.export, READ),
            Route("import", history.ImportRequest, Empty, do.import_exchanges, BULK, "imports"),
            Route("exchange", history.ExchangeRequest, history.Exchange, do.find, READ),
            Route(
                "branch", history.BranchRequest, history.Branch, self.branches.read, READ, "chats"
            ),
            Route("remove", history.RemoveRequest, Empty, do.remove, CHANGE),
            Route("clear", history.ClearRequest, Empty, do.clear, CHANGE),
            Route("delete", history.DeleteRequest, Empty, do.erase, CHANGE),
        )
        endpoints = [self._endpoint(route) for route in routes]
        endpoints.append(self.bus.endpoint("status", subjects.HISTORY_STATUS, Empty, self._status))
        await self.bus.subscribe(
            subjects.HISTORY_APPEND_FAILED, lambda _: self.guard.schedule_check()
        )
        await self.bus.serve("history", "Contexts, messages and changes of sessions", endpoints)
        await self.bus.serve_retries(endpoints)

    def _endpoint(self, route: Route[Any, Any]) -> Endpoint:
        lane = self.lanes[route.lane]

        async def handle(subject: str, request: Any) -> Struct:
            tenant = subjects.tenant_of_history(subject)
            with (
                tracing.span(f"history {route.verb}", "server"),
                _as_service_error(),
                self._checking(route.access),
            ):
                await self._admit(route.access, tenant, request)
                async with lane.place(tenant):
                    reply: Struct = await route.method(tenant, request)
            return reply

        subject = subjects.history(route.verb, subjects.ANY)
        return self.bus.endpoint(route.verb, subject, route.request, handle)

    async def _admit(self, access: Access, tenant: str, request: Struct) -> None:
        """Raise ServiceError if the log can't store what follows from the request."""
        is_answered = isinstance(request, history.ContextRequest) and request.is_answered
        if access is READ or is_answered:
            return
        if access is GROW:
            self.quota.require_room()
        if access is BULK:
            await self.room.wait(tenant)
        await self.guard.require_writable()

    @contextmanager
    def _checking(self, access: Access) -> Iterator[None]:
        """Schedule a check of the log if the request fails because of it."""
        try:
            yield
        except StreamUnavailable as error:
            if access is not READ or isinstance(error, StreamDamaged):
                self.guard.schedule_check()
            raise

    async def _context(self, tenant: str, request: history.ContextRequest) -> history.ContextReply:
        """Have workers ask for each answer while the log may soon reject them."""
        reply = await self.sessions.context(tenant, request)
        return structs.replace(reply, window=None) if self.quota.is_tight else reply

    async def _status(self, subject: str, request: Empty) -> history.HistoryStatus:
        return await self.status()

    async def status(self) -> history.HistoryStatus:
        state = unarchived = None
        with suppress(StreamUnavailable):
            state = await self.session_log.stream.state()
            unarchived = await self.session_log.count_unarchived()
        rejection = self.guard.rejection or self.quota.rejection
        return history.HistoryStatus(
            database_connected=self.archive.connected,
            log_records=state and state.messages,
            log_bytes=state and state.bytes,
            unarchived=unarchived,
            unreadable=self.archive.unreadable,
            log_limit=state and state.limit,
            warning=self.guard.warning or self.quota.warning,
            refuses=rejection.code if rejection else None,
            waiting=sum(lane.waiting for lane in self.lanes.values()),
            overloaded=sum(lane.rejected for lane in self.lanes.values()),
            dropped=self.dropper.dropped,
            database_expected=self.archive.is_expected,
        )


async def start(
    stack: AsyncExitStack,
    settings: HistorySettings,
    fail: Fail,
    limits: HistoryLimits = LIMITS,
) -> None:
    """
    Build the service on `stack`, which closes it in reverse: no more requests are taken, the loops
    stop, and requests in progress are answered.
    """
    retention = settings.retention_seconds
    uri, database = settings.mongodb_uri, settings.mongodb_database
    archive = Archive(uri, database, fail, retention, limits, uri == DEFAULT_MONGODB)
    await stack.enter_async_context(archive.running())
    bus = await stack.enter_async_context(
        Bus.connect(settings.nats_url, "history", NatsAccess.of(settings))
    )
    session_log = await _open_log(stack, bus, settings, limits)
    limits = session_log.limits
    snapshots = Snapshots(session_log, settings, bus.spawn)
    repair = LogRepair(session_log, snapshots, Stream(bus, subjects.HISTORY_REPAIR_STREAM))
    guard = LogGuard(session_log, Checkup(session_log, snapshots, repair), fail)
    session_quota = SessionQuota(session_log, settings.history_max_sessions, fail)
    quota, dropper = LogQuota(limits), FairDropper(session_log, snapshots)

    _check_after_reconnects(bus, session_log, snapshots, guard)
    for loop in (
        guard,
        Archiver(session_log, archive, fail),
        SnapshotSaver(session_log, snapshots, fail),
        session_quota,
        Indexer(session_log.requests, fail, limits),
        Trimmer(session_log, snapshots, quota, guard, dropper, fail),
    ):
        await stack.enter_async_context(loop.running())
    sessions = Sessions(bus, session_log, archive, snapshots, session_quota)
    branches = Branches(session_log, archive, snapshots)
    service = HistoryService(
        bus,
        session_log,
        archive,
        sessions,
        branches,
        quota,
        guard,
        BulkRoom(session_log),
        dropper,
        _lanes(limits),
    )
    host, port = settings.metrics_host, settings.history_metrics_port
    state = partial(_state_from_a_thread, service, asyncio.get_running_loop())
    stack.enter_context(serving_metrics(bus, host, port, "HISTORY_METRICS_PORT", state))
    await service.serve()
    stack.push_async_callback(bus.stop_serving)


async def _open_log(
    stack: AsyncExitStack, bus: Bus, settings: HistorySettings, limits: HistoryLimits
) -> SessionLog:
    limits = replace(limits, max_payload_bytes=bus.max_payload)
    session_log = SessionLog(bus, settings.retention_seconds, settings.history_replicas, limits)
    stack.push_async_callback(session_log.close)
    await session_log.ensure()
    return session_log


def _check_after_reconnects(
    bus: Bus, session_log: SessionLog, snapshots: Snapshots, guard: LogGuard
) -> None:
    """Check the log after each reconnect: NATS may be back with an empty or an older store."""

    async def check() -> None:
        snapshots.forget_recent()
        await session_log.ensure()
        guard.reconnected()

    async def on_reconnect() -> None:
        bus.spawn(check())

    bus.on_reconnect(on_reconnect)


def _lanes(limits: HistoryLimits) -> Mapping[LaneName, Lane]:
    return {
        "chats": Lane("chats", limits.chat_lane),
        "bulk": Lane("bulk", limits.bulk_lane),
        "imports": Lane("imports", limits.import_lane),
    }


def _state_from_a_thread(
    service: HistoryService, loop: asyncio.AbstractEventLoop
) -> Iterable[Metric]:
    """Return history's figures, or that it does not reply, to the thread that serves metrics."""
    asking = asyncio.run_coroutine_threadsafe(service.status(), loop)
    try:
        status = asking.result(SCRAPE_SECONDS)
    except TimeoutError:
        return history_families(None)
    return chain(history_families(status), history_process_families(status))


@contextmanager
def _as_service_error() -> Iterator[None]:
    try:
        yield
    except StreamFull as error:
        raise ServiceError(
            "history_full",
            f"JetStream has no room ({error}). Give it more room, then try again.",
        ) from error
    except StreamUnavailable as error:
        raise ServiceError(
            "history_unavailable",
            f"The session log is not available ({error}). Check that NATS runs with JetStream"
            " (nats-server -js) and has free disk space, then try again.",
        ) from error
    except ArchiveUnavailable as error:
        raise ServiceError(
            "history_unavailable",
            f"Some of these exchanges are only in MongoDB, which is not available ({error})."
            " Start MongoDB, then try again.",
        ) from error
    except Conflict as error:
        raise ServiceError(
            "history_unavailable",
            "Too many changes of this session at once. Try again.",
            retry_after=1,
        ) from error
