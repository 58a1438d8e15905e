"""Answers for history on the bus: contexts, messages, clearing. Puts log and archive together."""

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

from services.contract import imports, subjects
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    Context,
    ContextRequest,
    DeleteRequest,
    DescribeRequest,
    Exchange,
    ExchangePage,
    ExchangeRequest,
    ExportPage,
    ExportRequest,
    HistoryStatus,
    ImportRequest,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import Empty, SessionErased
from services.history.archive import Archive
from services.history.archiver import Archiver
from services.history.contexts import Contexts
from services.history.guard import Guard
from services.history.log import Log
from services.history.quota import Quota
from services.history.requests import Indexer
from services.history.saver import Saver
from services.history.sessions import Sessions
from services.history.settings import DEFAULT_MONGODB, HistorySettings
from services.history.trimmer import Trimmer
from services.runtime.bus import Bus
from services.runtime.streams import Conflict, StreamDamaged, StreamFull, StreamUnavailable
from services.runtime.supervised import Fail


class History:
    def __init__(
        self,
        bus: Bus,
        log: Log,
        archive: Archive,
        contexts: Contexts,
        sessions: Sessions,
        quota: Quota,
        guard: Guard,
    ) -> None:
        self._bus = bus
        self._log = log
        self._archive = archive
        self._contexts = contexts
        self._sessions = sessions
        self._quota = quota
        self._guard = guard

    async def serve(self) -> None:
        at, bus = subjects, self._bus
        endpoints = [
            bus.endpoint(
                "context", at.history("context", at.ANY), ContextRequest, self._on_context
            ),
            bus.endpoint(
                "messages", at.history("messages", at.ANY), MessagesRequest, self._on_messages
            ),
            bus.endpoint(
                "sessions", at.history("sessions", at.ANY), SessionsRequest, self._on_sessions
            ),
            bus.endpoint(
                "describe", at.history("describe", at.ANY), DescribeRequest, self._on_describe
            ),
            bus.endpoint("export", at.history("export", at.ANY), ExportRequest, self._on_export),
            bus.endpoint("import", at.history("import", at.ANY), ImportRequest, self._on_import),
            bus.endpoint(
                "exchange", at.history("exchange", at.ANY), ExchangeRequest, self._on_exchange
            ),
            bus.endpoint("clear", at.history("clear", at.ANY), ClearRequest, self._on_clear),
            bus.endpoint("delete", at.history("delete", at.ANY), DeleteRequest, self._on_delete),
            bus.endpoint("status", at.HISTORY_STATUS, Empty, self._on_status),
        ]
        await bus.subscribe(at.HISTORY_APPEND_FAILED, lambda _: self._guard.doubt())
        await bus.serve("history", "what sessions are made of", endpoints)
        await bus.serve_retries(endpoints)

    async def _on_context(self, subject: str, request: ContextRequest) -> Context:
        """Refused if what will be said could not be stored: so nothing is generated in vain."""
        if not request.is_answered:
            self._quota.check()
            await self._guard.check()
        with self._changing():  # if it can't be read, nothing will be appended that shows it
            return await self._contexts.of(_key(subject, request.session_id))

    async def _on_messages(self, subject: str, request: MessagesRequest) -> ExchangePage:
        tenant = subjects.tenant_of_history(subject)
        key = subjects.session_key(tenant, request.session_id) if request.session_id else None
        with self._asking():
            return await self._sessions.messages(tenant, key, request.limit, request.before)

    async def _on_sessions(self, subject: str, request: SessionsRequest) -> SessionPage:
        tenant = subjects.tenant_of_history(subject)
        with self._asking():
            return await self._sessions.list(tenant, request.limit, request.before)

    async def _on_describe(self, subject: str, request: DescribeRequest) -> Session:
        await self._guard.check()
        key = _key(subject, request.session_id)
        with self._changing():
            return await self._sessions.describe(key, request.description, request.request_id)

    async def _on_export(self, subject: str, request: ExportRequest) -> ExportPage:
        with self._asking():
            return await self._sessions.export(_key(subject, request.session_id), request.after)

    async def _on_import(self, subject: str, request: ImportRequest) -> Empty:
        self._quota.check()
        await self._guard.check()
        for exchange in request.exchanges:
            imports.check(exchange)
        key = _key(subject, request.session_id)
        with self._changing():
            await self._sessions.bring_in(key, request.exchanges)
        return Empty()

    async def _on_exchange(self, subject: str, request: ExchangeRequest) -> Exchange:
        with self._asking():
            found = await self._sessions.find(
                subjects.tenant_of_history(subject), request.request_id
            )
        if found is None:
            raise ServiceError(
                "not_found",
                "No answer has this request id. Answers can be found for a day; with MongoDB, as"
                " long as they are kept.",
            )
        return found

    async def _on_clear(self, subject: str, request: ClearRequest) -> Empty:
        await self._guard.check()
        with self._changing():
            await self._sessions.clear(_key(subject, request.session_id), request.request_id)
        return Empty()

    async def _on_delete(self, subject: str, request: DeleteRequest) -> Empty:
        """Refused while the log is repaired: what is moved back would come after the erasure."""
        await self._guard.check()
        with self._changing():
            await self._sessions.erase(_key(subject, request.session_id), request.request_id)
        tenant = subjects.tenant_of_history(subject)
        await self._bus.publish(subjects.erased(tenant), SessionErased(request.session_id))
        return Empty()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with _as_service_error():
            try:
                yield
            except StreamDamaged:
                self._guard.doubt()
                raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with _as_service_error():
            try:
                yield
            except StreamUnavailable:
                self._guard.doubt()
                raise

    async def _on_status(self, subject: str, request: Empty) -> HistoryStatus:
        state = unarchived = None
        with suppress(StreamUnavailable):
            state = await self._log.state()
            unarchived = await self._log.count_unarchived()
        refusal = self._guard.refusal or self._quota.refusal
        return HistoryStatus(
            database_connected=self._archive.connected,
            log_records=state and state.messages,
            log_bytes=state and state.bytes,
            unarchived=unarchived,
            unreadable=self._archive.unreadable,
            log_limit=state and state.limit,
            warning=self._guard.warning or self._quota.warning,
            refuses=refusal.code if refusal else None,
        )


async def start(stack: AsyncExitStack, settings: HistorySettings, fail: Fail) -> None:
    """Closed last first: no more is asked, the archiver stops, what was asked is answered."""
    retention = settings.retention_seconds
    archive = await stack.enter_async_context(
        Archive.open(
            settings.mongodb_uri,
            settings.mongodb_database,
            retention,
            fail,
            is_optional=settings.mongodb_uri == DEFAULT_MONGODB,
        )
    )
    bus = await stack.enter_async_context(Bus.connect(settings.nats_url, "history"))
    log = Log(bus, retention, settings.history_replicas)
    stack.push_async_callback(log.close)
    await log.ensure()

    guard = Guard(log, fail)

    async def ensure_again() -> None:  # the server may be back with an empty or an older store
        bus.spawn(ensure_and_check())

    async def ensure_and_check() -> None:
        await log.ensure()
        guard.restarted()

    bus.on_reconnect(ensure_again)
    contexts, quota = Contexts(log, settings, bus.spawn), Quota()
    await stack.enter_async_context(guard.running())
    await stack.enter_async_context(Archiver(log, archive, fail).running())
    await stack.enter_async_context(Saver(log, contexts, fail).running())
    await stack.enter_async_context(Indexer(log.requests, fail).running())
    await stack.enter_async_context(Trimmer(log, contexts, quota, guard, fail).running())
    sessions = Sessions(log, archive, contexts)
    await History(bus, log, archive, contexts, sessions, quota, guard).serve()
    stack.push_async_callback(bus.stop_serving)


def _key(subject: str, session_id: str) -> str:
    return subjects.session_key(subjects.tenant_of_history(subject), session_id)


@contextmanager
def _as_service_error() -> Iterator[None]:
    try:
        yield
    except StreamFull as error:
        raise ServiceError(
            "history_full", f"JetStream has no room ({error}): give it some, then try again.", 5
        ) from error
    except StreamUnavailable as error:
        raise ServiceError(
            "history_unavailable",
            f"The sessions' log can't be reached ({error}): check that NATS runs with JetStream"
            " (nats-server -js) and has room on its disk, then try again.",
        ) from error
    except Conflict as error:
        raise ServiceError(
            "history_unavailable", "The session is too busy to be changed now; try again."
        ) from error
