"""An exchange as MongoDB keeps it. Knows BSON, and no connection."""

from datetime import datetime
from typing import Any

import bson
import msgspec

from services.contract import subjects
from services.contract.history import Exchange
from services.history.entry import Entry, Unreadable, archive_id

Document = dict[str, Any]


def is_kept(entry: Entry) -> bool:
    return isinstance(entry.record, Exchange)


def checked(entry: Entry) -> Entry:
    """The entry, or an unreadable one where MongoDB could never take it: a number too large."""
    if isinstance(entry.record, Exchange):
        try:
            bson.encode(of(entry))
        except (bson.errors.BSONError, OverflowError) as error:
            return entry._replace(record=Unreadable(str(error)))
    return entry


def of(entry: Entry) -> Document:
    """Of one that is kept."""
    assert isinstance(entry.record, Exchange)
    tenant, session_id = subjects.session_of_key(entry.key)
    exchange: Document = msgspec.to_builtins(entry.record, builtin_types=(datetime,))
    return exchange | {
        "_id": archive_id(entry.key, entry.record.request_id),
        "key": entry.key,
        "tenant": tenant,
        "session_id": session_id,
        "seq": entry.seq,
        "logged_at": entry.logged_at,
    }


def read(document: Document) -> Entry:
    record: Exchange | Unreadable
    try:
        record = msgspec.convert(document, Exchange)
    except msgspec.ValidationError as error:
        record = Unreadable(str(error))
    is_retried = "retried_by" in document
    return Entry(document["seq"], document["key"], document["logged_at"], record, is_retried)


def upsert(document: Document) -> tuple[Document, Document]:
    """What is there stays, so that repeating a batch costs little."""
    return {"_id": document["_id"]}, {"$setOnInsert": document}


def mark(retry: Document) -> tuple[Document, Document]:
    """Of the exchange whose place this one takes: the archive keeps it, marked."""
    retried = archive_id(retry["key"], retry["retry_of"])
    return {"_id": retried}, {"$set": {"retried_by": retry["request_id"]}}
