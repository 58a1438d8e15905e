"""What a worker is asked of its tokens. It answers beside its engine, and never waits for it."""

from typing import Annotated

from msgspec import Meta, Struct

from services.contract.messages import TokenId

Text = Annotated[str, Meta(max_length=524_288)]


TOKENS_TIMEOUT_SECONDS = 5.0
"""Seconds that a caller waits for the answer of a worker."""


class TokenizeRequest(Struct, frozen=True):
    """
    `add_special`: with the token that begins every prompt of the model; `parse_special`: text that
    names a control token becomes it. A long text's `pieces` are more than a message can hold.
    """

    text: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class TokenPiece(Struct, frozen=True):
    """`bytes` tells what `text` can't, where it is a part of a character."""

    id: int
    text: str
    bytes: tuple[int, ...]


class TokenizeReply(Struct, frozen=True):
    tokens: tuple[TokenId, ...]
    pieces: tuple[TokenPiece, ...] = ()  # of the same tokens, if they were asked for


class DetokenizeRequest(Struct, frozen=True):
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=262_144)]


class DetokenizeReply(Struct, frozen=True):
    text: str


class TokenCount(Struct, frozen=True):
    """Tokens that the prompt of a request would have."""

    tokens: int
