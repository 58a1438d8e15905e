"""Tokenizes, detokenizes and counts tokens on a thread of its own, whatever the engine does."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from msgspec import Struct

from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import ChatRequest
from services.contract.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
    TokenPiece,
)
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedModel
from services.inference.pool import Pool
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery

K = TypeVar("K", bound=Struct)


@dataclass(eq=False)
class TokenService:
    """Must be closed before its model."""

    bus: Bus
    worker_id: str
    model: LoadedModel
    limits: InferenceLimits

    def __post_init__(self) -> None:
        self._special = self.model.backend.special_tokens()
        self._pool = Pool("tokens", 1, self.limits.token_queue)
        self._is_closing = False

    async def start(self) -> None:
        await self._serve(subjects.tokenize, TokenizeRequest, self._tokenize)
        await self._serve(subjects.detokenize, DetokenizeRequest, self._detokenize)
        await self._serve(subjects.count, ChatRequest, self._count)

    async def close(self) -> None:
        self._is_closing = True
        await self._pool.close()

    async def _serve(
        self, subject: Callable[[str, str], str], kind: type[K], work: Callable[[K], Struct]
    ) -> None:
        async def reply(delivery: Delivery) -> Struct:
            tenant = subjects.tenant_of(delivery.subject)
            return await self._run(tenant, work, decode(delivery.data, kind))

        await self.bus.subscribe(
            subject(self.worker_id, subjects.ANY),
            lambda delivery: self.bus.respond(delivery, reply),
        )

    async def _run(self, tenant: str, work: Callable[[K], Struct], request: K) -> Struct:
        if self._is_closing:
            raise shutting_down()
        try:
            async with asyncio.timeout(self.limits.token_seconds):
                return await self._pool.run(tenant, work, request)
        except TimeoutError:  # work that has not started by now never starts
            raise ServiceError(
                "overloaded", "The worker has too many requests to count tokens: try again."
            ) from None

    def _tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        template = self.model.template
        tokens = (
            template.tokenize(template.with_bos(""), special=True) if request.add_special else []
        )
        tokens += template.tokenize(request.text, request.parse_special)
        if request.with_pieces and len(tokens) > self.limits.max_token_pieces:
            raise ServiceError(
                "payload_too_large",
                f"The pieces of {len(tokens):,} tokens don't fit into one message: send less text,"
                " or leave out `with_pieces`.",
            )
        pieces = map(self._piece, tokens) if request.with_pieces else ()
        return TokenizeReply(tuple(tokens), tuple(pieces))

    def _detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        backend = self.model.backend
        last = backend.vocabulary_size - 1
        if unknown := [token for token in request.tokens if token > last]:
            raise ServiceError(
                "invalid_request",
                f"The field `tokens` has the token {unknown[0]}, but the model's last token is"
                f" {last}.",
            )
        pieces = b"".join(map(backend.piece, request.tokens))
        return DetokenizeReply(pieces.decode(errors="replace"))

    def _count(self, request: ChatRequest) -> TokenCount:
        prompts.check(request)
        if request.messages is None:
            raise ServiceError("invalid_request", "The field `messages` is missing.")
        template, options = self.model.template, self.model.prompt_options(request)
        tokens = template.tokenize_conversation(request.messages, options.tools, options=options)
        return TokenCount(len(tokens))

    def _piece(self, token: int) -> TokenPiece:
        data = self.model.backend.piece(token)
        special = self._special.get(token)
        text = special.text if special else data.decode(errors="replace")
        return TokenPiece(token, text, tuple(data))
