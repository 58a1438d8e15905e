"""
Requests for embeddings and relevance scores, and their replies. Both are stateless: a request that
got no reply can be sent again.
"""

import struct
from typing import Annotated

from msgspec import Meta, Struct

from services.contract.errors import ServiceError
from services.contract.messages import ModelName, Tokens
from services.contract.tokens import Text

MAX_INPUTS = 2048
"""In one request, as in OpenAI's API."""

Input = Annotated[str, Meta(min_length=1, max_length=524_288)] | Tokens
"""A text, or the token ids of one, with the special tokens that the model expects."""


Dimensions = Annotated[int, Meta(ge=1, le=1_000_000)]


class EmbedRequest(Struct, frozen=True, omit_defaults=True):
    """`dimensions` cuts the vectors, which are normalised afterwards."""

    input: Annotated[tuple[Input, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: ModelName | None = None
    dimensions: Dimensions | None = None


def check_dimensions(request: EmbedRequest, width: int) -> None:
    """Check them against the `width` of the model's vectors. Raises ServiceError."""
    if request.dimensions and request.dimensions > width:
        raise ServiceError(
            "invalid_request",
            f"The field `dimensions` is {request.dimensions}, but the model's embeddings have"
            f" {width}: ask for at most that.",
        )


class Embeddings(Struct, frozen=True):
    """
    The vectors of the whole input, in order. Each is little-endian float32, normalised; in JSON
    these bytes are base64, as in OpenAI's API.
    """

    model: str
    vectors: tuple[bytes, ...]
    prompt_tokens: int


def floats_of(vector: bytes) -> tuple[float, ...]:
    """Return the values of a vector of an Embeddings."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


class RerankRequest(Struct, frozen=True, omit_defaults=True):
    query: Annotated[Text, Meta(min_length=1)]
    documents: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: ModelName | None = None


class Scores(Struct, frozen=True):
    """How relevant each document is to the query, 0 to 1, in the order of the documents."""

    model: str
    scores: tuple[float, ...]
    prompt_tokens: int
