"""Exchanges as MongoDB documents. Knows BSON, but no connection."""

from collections.abc import ValuesView
from datetime import datetime
from typing import Any

import bson
import msgspec
from bson.errors import InvalidDocument

from services.contract import subjects
from services.contract.history import Exchange
from services.history.entry import Entry, Unreadable, archive_id

Document = dict[str, Any]
Update = tuple[Document, Document]
"""Filter and update of one document."""

AS_JSON = "as_json"
"""Name of the sub-document with the JSON text of the fields that BSON can't hold."""
MAX_DEPTH = 50  # levels; MongoDB's limit for a document is 100
MAX_FIELD_BYTES = 2 * 1024**2  # BSON size of a field, which can be many times its JSON size


def to_document(entry: Entry) -> Document:
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
        "seq": entry.seq,
        "logged_at": entry.logged_at,
    }


def from_document(document: Document) -> Entry:
    record: Exchange | Unreadable
    try:
        texts = document.get(AS_JSON, {})
        fields = {name: msgspec.json.decode(text) for name, text in texts.items()}
        record = msgspec.convert(document | fields, Exchange)
    except msgspec.MsgspecError as error:
        record = Unreadable(str(error))
    is_retried = "retried_by" in document
    return Entry(document["seq"], document["key"], document["logged_at"], record, is_retried)


def insert_if_absent(document: Document) -> Update:
    return {"_id": document["_id"]}, {"$setOnInsert": document}


def mark_retried(retry: Document) -> Update:
    """Return the update that marks the exchange which this one replaces."""
    retried = archive_id(retry["key"], retry["retry_of"])
    return {"_id": retried}, {"$set": {"retried_by": retry["request_id"]}}


def _fits(value: Any) -> bool:
    """Return whether MongoDB can store the value. Older servers reject keys with `$` or `.`."""
    if not _is_shallow(value, MAX_DEPTH):
        return False
    try:
        return len(bson.encode({"": value}, check_keys=True)) <= MAX_FIELD_BYTES
    except (InvalidDocument, OverflowError):
        return False


def _is_shallow(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(children, list | tuple | ValuesView):
        return True
    return levels > 0 and all(_is_shallow(child, levels - 1) for child in children)
