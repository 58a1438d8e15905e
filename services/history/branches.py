"""Branches of the trees of responses: what the next response of `/v1/responses` continues."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.contract import history, responses, subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, Removed
from services.contract.responses import ResponseTurn
from services.history.archive import Archive
from services.history.context import Snapshot
from services.history.entry import Entry, fit_newest
from services.history.log import SessionLog
from services.history.snapshots import Snapshots

ENTRY_BYTES = 4096  # memory of a record beside its texts
MAX_EXCHANGES = 100_000  # of a tree that are read from MongoDB


class Branches:
    def __init__(self, session_log: SessionLog, archive: Archive, snapshots: Snapshots) -> None:
        self._log = session_log
        self._archive = archive
        self._snapshots = snapshots
        self._trees = TreeCache(session_log.limits.max_tree_bytes)

    async def read(self, tenant: str, request: history.BranchRequest) -> history.Branch:
        """
        Return a branch. Raises ServiceError(not_found) if the conversation or a response of the
        branch does not exist; ArchiveUnavailable if only MongoDB has some of it.
        """
        key = subjects.session_key(tenant, responses.session_of_tree(request.tree))
        session = await self._snapshots.current(key)
        is_missing = session.metadata is None if request.request_id is None else False
        if session.active_at is None or is_missing:
            raise _not_found(request.request_id)
        known = await self._exchanges(key, session)
        found = branch(known, request.request_id, request.limit)
        newest = fit_newest(found, self._log.limits.max_page_bytes)
        return history.Branch(newest, len(newest) == len(found), session.metadata or {})

    async def _exchanges(self, key: str, session: Snapshot) -> list[Exchange]:
        """Return all exchanges of the tree, oldest first, without those that were removed."""
        known, size = self._trees.take(key)
        if not known or known[0].seq <= session.epoch or not await self._is_current(known[-1]):
            known, size = [], 0
        end = known[-1].seq if known else session.epoch
        last = await self._log.last(key)
        new = [entry async for entry in self._log.walk_back(last, end)]
        if not known and not await self._log.is_complete(key, end, session.first_seq):
            archived = await self._archive.oldest(key, MAX_EXCHANGES, None)
            new += [entry for entry in archived if entry.seq > end]
        entries = [*known, *sorted(new, key=lambda entry: entry.position)]
        self._trees.put(key, entries, size + sum(map(_size, new)))
        return exchanges_of(entries)

    async def _is_current(self, entry: Entry) -> bool:
        """Return whether the log still has the record, as it is not the same log otherwise."""
        stored = await self._log.get(entry.seq)
        return stored is not None and (stored.key, stored.logged_at) == (entry.key, entry.logged_at)


class TreeCache:
    """Records of recently read trees. They save reading the log; a missing one costs only that."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._trees: OrderedDict[str, tuple[list[Entry], int]] = OrderedDict()

    def take(self, key: str) -> tuple[list[Entry], int]:
        """Remove a tree, and return its records, oldest first, with their size."""
        entries, size = self._trees.pop(key, ([], 0))
        self._bytes -= size
        return entries, size

    def put(self, key: str, entries: list[Entry], size: int) -> None:
        self.take(key)
        self._trees[key] = entries, size
        self._bytes += size
        while self._bytes > self._max_bytes:
            self.take(next(iter(self._trees)))


def exchanges_of(entries: Iterable[Entry]) -> list[Exchange]:
    """Return the exchanges among a tree's records, oldest first, each once and unless removed."""
    ordered = sorted(entries, key=lambda entry: entry.position)
    removed = {each.record.request_id for each in ordered if isinstance(each.record, Removed)}
    found: dict[str, Exchange] = {}
    for entry in ordered:
        if isinstance(entry.record, Exchange) and entry.request_id not in removed:
            found.setdefault(entry.request_id, entry.record)
    return list(found.values())


def branch(
    known: Sequence[Exchange], request_id: str | None, limit: int | None = None
) -> list[Exchange]:
    """
    Return the last `limit` responses up to this one, oldest first; without an id, those of the
    conversation. Raises ServiceError(not_found) if one of them is unknown.
    """
    places = {each.request_id: at for at, each in enumerate(known)}
    found: list[Exchange] = []
    end, wanted = len(known), request_id
    while wanted is not None and len(found) != limit:
        if wanted not in places:
            raise _not_found(wanted)
        end = places.pop(wanted)  # a cycle, which only a forged record can make, ends here
        found.append(known[end])
        if _turn(known[end]).is_in_conversation:
            break
        wanted = _turn(known[end]).parent
    if request_id is None or wanted is not None:
        before = [each for each in known[:end] if _turn(each).is_in_conversation]
        found += reversed(before)
    return found[:limit][::-1]


def _size(entry: Entry) -> int:
    """Estimate the memory of a record in bytes."""
    if not isinstance(entry.record, Exchange):
        return ENTRY_BYTES
    items = _turn(entry.record).input
    texts = len(entry.record.response) + len(entry.record.reasoning) + len(entry.record.prompt)
    return ENTRY_BYTES + 2 * texts + sum(len(str(item)) for item in items)


def _turn(exchange: Exchange) -> ResponseTurn:
    """An exchange without one was imported, and begins a branch."""
    return exchange.turn or ResponseTurn()


def _not_found(request_id: str | None) -> ServiceError:
    what = f"response 'resp_{request_id}'" if request_id else "conversation"
    return ServiceError("not_found", f"The {what} does not exist, or was deleted.")
