"""Requests to tokenize, detokenize and count tokens. Workers serve them beside their engine."""

from typing import Annotated

from msgspec import Meta, Struct

from services.contract.messages import TokenId

Text = Annotated[str, Meta(max_length=524_288)]


TOKENS_TIMEOUT_SECONDS = 5.0
"""How long callers wait for a worker's reply."""


class TokenizeRequest(Struct, frozen=True):
    """
    `add_special` prepends the model's BOS token. `parse_special` turns the text of a control token
    into that token. `with_pieces` adds the text of each token; those of a long text exceed the
    maximum message size.
    """

    text: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class TokenPiece(Struct, frozen=True):
    """A token with its text. `bytes` is exact where a token is a part of a character."""

    id: int
    text: str
    bytes: tuple[int, ...]


class TokenizeReply(Struct, frozen=True):
    tokens: tuple[TokenId, ...]
    pieces: tuple[TokenPiece, ...] = ()  # of the same tokens, with `with_pieces`


class DetokenizeRequest(Struct, frozen=True):
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=262_144)]


class DetokenizeReply(Struct, frozen=True):
    text: str


class TokenCount(Struct, frozen=True):
    """Number of tokens in the prompt of a request."""

    tokens: int
