"""An exchange as MongoDB keeps it. Knows BSON, and no connection."""

from datetime import datetime
from typing import Any

import bson
import msgspec

from services.contract import subjects
from services.contract.history import Exchange
from services.contract.imports import is_in_utc
from services.history.entry import Entry, Unreadable, archive_id

Document = dict[str, Any]

AS_JSON = "as_json"
"""Name of the sub-document with the JSON text of the fields that BSON can't hold."""
MAX_DEPTH = 50  # levels; MongoDB's limit for a document is 100
MAX_FIELD_BYTES = 2 * 1024**2  # BSON size of a field, which can be many times its JSON size
BSON_INTS = range(-(2**63), 2**63)


def is_kept(entry: Entry) -> bool:
    return isinstance(entry.record, Exchange)


def of(entry: Entry) -> Document:
    """
    Return the document of an exchange. Fields that BSON can't hold are stored as JSON text, so that
    every exchange of the log can be archived.
    """
    assert isinstance(entry.record, Exchange)
    tenant, session_id = subjects.session_of_key(entry.key)
    exchange: Document = msgspec.to_builtins(entry.record, builtin_types=(datetime,))
    texts = {
        name: msgspec.json.encode(value).decode()
        for name, value in exchange.items()
        if not _fits(value)
    }
    if texts:
        exchange = {k: v for k, v in exchange.items() if k not in texts} | {AS_JSON: texts}
    return exchange | {
        "_id": archive_id(entry.key, entry.record.request_id),
        "key": entry.key,
        "tenant": tenant,
        "session_id": session_id,
        "request_id": entry.record.request_id,
        "retry_of": entry.record.retry_of,
        "seq": entry.seq,
        "logged_at": entry.logged_at,
    }


def read(document: Document) -> Entry:
    record: Exchange | Unreadable
    try:
        texts = document.get(AS_JSON, {})
        fields = {name: msgspec.json.decode(text) for name, text in texts.items()}
        record = msgspec.convert(document | fields, Exchange)
    except msgspec.MsgspecError as error:
        record = Unreadable(str(error))
    is_retried = "retried_by" in document
    return Entry(document["seq"], document["key"], document["logged_at"], record, is_retried)


def _fits(value: Any) -> bool:
    return _is_bson(value, MAX_DEPTH) and len(bson.encode({"": value})) <= MAX_FIELD_BYTES


def _is_bson(value: Any, depth: int) -> bool:
    """Return whether MongoDB can store the value. Older servers reject keys with `$` or `.`."""
    match value:
        case int():
            return value in BSON_INTS
        case datetime():
            return is_in_utc(value)
        case dict():
            return depth > 0 and all(
                not (key.startswith("$") or "." in key or "\0" in key) and _is_bson(each, depth - 1)
                for key, each in value.items()
            )
        case list() | tuple():
            return depth > 0 and all(_is_bson(each, depth - 1) for each in value)
    return True


def upsert(document: Document) -> tuple[Document, Document]:
    """What is there stays, so that repeating a batch costs little."""
    return {"_id": document["_id"]}, {"$setOnInsert": document}


def mark(retry: Document) -> tuple[Document, Document]:
    """Of the exchange whose place this one takes: the archive keeps it, marked."""
    retried = archive_id(retry["key"], retry["retry_of"])
    return {"_id": retried}, {"$set": {"retried_by": retry["request_id"]}}
