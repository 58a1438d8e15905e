"""
Responses of `/v1/responses` in the log: their ids, their sessions, and what is kept beside an
exchange.

Responses that continue one another, or belong to one conversation, form a tree. A tree is a session
of its own, and its id is the first half of the request ids in it, so that a response's record is
found by its id alone, for as long as the log or the archive has it.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from msgspec import Meta, Struct

TreeId = Annotated[str, Meta(pattern="^[0-9a-f]{32}\\Z")]
ResponseRequestId = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]

PREFIX = "responses_"
_SESSION = re.compile("responses_[0-9a-f]{32}")
_TREE, _REQUEST = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")
_TREE_LENGTH = 32
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ResponseTurn(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    What is kept of a response beside its exchange. `parent` is the request id of the response that
    it continues; one of a conversation continues all that the conversation had before. `input` has
    the new items, and `parameters` the request's, in the form in which the API returns them.
    """

    parent: ResponseRequestId | None = None
    is_in_conversation: bool = False
    input: tuple[dict[str, Any], ...] = ()
    parameters: dict[str, Any] = {}


def request_id(tree: str, own: UUID) -> str:
    """Return the request id of a response; `own` is a UUIDv7."""
    return tree + own.hex


def is_request_id(text: str) -> bool:
    """Return whether `text` can be the request id of a response."""
    return _REQUEST.fullmatch(text) is not None


def is_tree(text: str) -> bool:
    """Return whether `text` can be the id of a tree."""
    return _TREE.fullmatch(text) is not None


def tree_of(request_id: str) -> str:
    return request_id[:_TREE_LENGTH]


def session_of_tree(tree: str) -> str:
    """Return the id of the session with the responses of a tree."""
    return PREFIX + tree


def session_of(request_id: str) -> str:
    """Return the id of the session with the response of this request id."""
    return session_of_tree(tree_of(request_id))


def tree_of_session(session_id: str) -> str:
    return session_id.removeprefix(PREFIX)


def is_session(session_id: str) -> bool:
    """Return whether the session belongs to `/v1/responses`: no other route continues it."""
    return _SESSION.fullmatch(session_id) is not None


def created_at(id_: str) -> datetime:
    """Return the time in a tree's id, or in a request id, which end with a UUIDv7."""
    return UNIX_EPOCH + timedelta(milliseconds=UUID(id_[-_TREE_LENGTH:]).int >> 80)
