"""Answers what the tokens of something are: in threads of its own, whatever the engine is doing."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from msgspec import Struct

from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest
from services.contract.tokens import (
    TOKENS_TIMEOUT_SECONDS,
    DetokenizeReply,
    DetokenizeRequest,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
    TokenPiece,
)
from services.inference.models import LoadedModel
from services.inference.pool import Pool
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery

QUEUE = 64  # requests that wait for the thread
MARGIN = 0.5  # seconds left to send the error before the caller stops waiting
MAX_PIECES = 2**15
"""Maximum per answer: more would exceed a NATS message, and take long to encode."""

K = TypeVar("K", bound=Struct)


class TokenService:
    """Closed before its model is."""

    def __init__(self, bus: Bus, worker_id: str, model: LoadedModel) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._model = model
        self._special = model.backend.special_tokens()
        self._pool = Pool("counting", 1, QUEUE)
        self._closing = False

    async def open(self) -> None:
        await self._serve(subjects.tokenize(self._worker_id), TokenizeRequest, self._tokenize)
        await self._serve(subjects.detokenize(self._worker_id), DetokenizeRequest, self._detokenize)
        await self._serve(subjects.count(self._worker_id), ChatRequest, self._count)

    async def close(self) -> None:
        self._closing = True
        await self._pool.close()

    async def _serve(self, subject: str, kind: type[K], work: Callable[[K], Struct]) -> None:
        async def do(delivery: Delivery) -> Struct:
            return await self._do(delivery, kind, work)

        await self._bus.subscribe(subject, lambda delivery: self._bus.respond(delivery, do))

    async def _do(self, delivery: Delivery, kind: type[K], work: Callable[[K], Struct]) -> Struct:
        if self._closing:
            raise ServiceError("shutting_down", "The worker is shutting down: ask again.", 1)
        request = decode(delivery.data, kind)
        try:
            async with asyncio.timeout(TOKENS_TIMEOUT_SECONDS - MARGIN):
                return await self._pool.run(work, request)
        except TimeoutError:  # work that has not started by now never starts
            raise ServiceError(
                "overloaded", "The worker has too many requests to count tokens: try again.", 1
            ) from None

    def _tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        template = self._model.template
        tokens = (
            template.tokenize(template.with_bos(""), special=True) if request.add_special else []
        )
        tokens += template.tokenize(request.text, request.parse_special)
        if request.with_pieces and len(tokens) > MAX_PIECES:
            raise ServiceError(
                "payload_too_large",
                f"The pieces of {len(tokens):,} tokens don't fit into one message: send less text,"
                " or leave out `with_pieces`.",
            )
        pieces = map(self._piece, tokens) if request.with_pieces else ()
        return TokenizeReply(tuple(tokens), tuple(pieces))

    def _detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        size = self._model.backend.vocabulary_size
        if wrong := [token for token in request.tokens if token >= size]:
            raise ServiceError(
                "invalid_request",
                f"The field `tokens` has {wrong[0]}, and the model's last token is {size - 1}.",
            )
        pieces = b"".join(map(self._model.backend.piece, request.tokens))
        return DetokenizeReply(pieces.decode(errors="replace"))

    def _count(self, request: ChatRequest) -> TokenCount:
        prompts.check(request)
        if request.messages is None:
            raise ServiceError("invalid_request", "The field `messages` is missing.")
        tools = () if request.tool_choice == "none" else request.tools or ()
        return TokenCount(len(self._model.template.tokenize_conversation(request.messages, tools)))

    def _piece(self, token: int) -> TokenPiece:
        data = self._model.backend.piece(token)
        special = self._special.get(token)
        text = special.text if special else data.decode(errors="replace")
        return TokenPiece(token, text, tuple(data))
