"""Branches of the trees of responses: what the next response of `/v1/responses` continues."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.contract import history, responses, subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, Removed
from services.contract.responses import ResponseTurn
from services.history.archive import Archive
from services.history.context import Snapshot
from services.history.entry import Entry, Position, fit_newest, memory_of
from services.history.log import SessionLog
from services.history.snapshots import Snapshots

ARCHIVED_PAGE = 50  # exchanges that are read from MongoDB at once


class Branches:
    def __init__(self, session_log: SessionLog, archive: Archive, snapshots: Snapshots) -> None:
        self._log = session_log
        self._archive = archive
        self._snapshots = snapshots
        self._trees = TreeCache(session_log.limits.max_tree_bytes)

    async def read(self, tenant: str, request: history.BranchRequest) -> history.Branch:
        """
        Return a branch. Raises ServiceError(not_found) if the conversation or a response of the
        branch does not exist, ServiceError(payload_too_large) if its tree can't be held in memory,
        ArchiveUnavailable if only MongoDB has some of it.
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
        tree = _Tree(known, size, self._log.limits.max_read_tree_bytes)
        async for entry in self._log.walk_back(await self._log.last(key), end):
            tree.add(entry)
        if not known and not await self._log.is_complete(key, end, session.first_seq):
            await self._add_archived(tree, key, end)
        tree.entries.sort(key=lambda entry: entry.position)
        self._trees.put(key, tree.entries, tree.bytes)
        return exchanges_of(tree.entries)

    async def _add_archived(self, tree: "_Tree", key: str, above: int) -> None:
        after: Position | None = None
        while archived := await self._archive.oldest(key, ARCHIVED_PAGE, after):
            for entry in archived:
                if entry.seq > above:
                    tree.add(entry)
            after = archived[-1].position

    async def _is_current(self, entry: Entry) -> bool:
        """Return whether the log still has the record, as it is not the same log otherwise."""
        stored = await self._log.get(entry.seq)
        return stored is not None and (stored.key, stored.logged_at) == (entry.key, entry.logged_at)


class _Tree:
    """Records of a tree while it is read."""

    def __init__(self, known: Iterable[Entry], size: int, max_bytes: int) -> None:
        self.entries = list(known)
        self.bytes = size
        self._max_bytes = max_bytes

    def add(self, entry: Entry) -> None:
        """Raise ServiceError(payload_too_large) if this is too much."""
        self.entries.append(entry)
        self.bytes += memory_of(entry)
        if self.bytes > self._max_bytes:
            raise ServiceError(
                "payload_too_large",
                f"These responses and all that belong to them take over {self._max_bytes >> 20}"
                " MiB: begin a new conversation, or one without `previous_response_id`.",
            )


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
        """Keep a tree, in place of the oldest ones; not one that would leave no room for others."""
        self.take(key)
        if size > self._max_bytes:
            return
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


def _turn(exchange: Exchange) -> ResponseTurn:
    """An exchange without one was imported, and begins a branch."""
    return exchange.turn or ResponseTurn()


def _not_found(request_id: str | None) -> ServiceError:
    what = f"response 'resp_{request_id}'" if request_id else "conversation"
    return ServiceError("not_found", f"The {what} does not exist, or was deleted.")
