"""Tokenize, detokenize and count requests to a worker, on a real bus."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, ModelInfo
from services.contract.tokens import (
    TOKENS_TIMEOUT_SECONDS,
    DetokenizeReply,
    DetokenizeRequest,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
    TokenPiece,
)
from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedModel
from services.inference.tokens import TokenService
from services.runtime.bus import Bus
from tests.inference.chat_templates import CHATML
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import ADDED, WithSpecialTokens

INFO = ModelInfo("fake", "digest", 1000, 0)
LIMITS = InferenceLimits(token_queue=8, token_seconds=1.0)


class GatedBackend(WithSpecialTokens):
    """Records what it has to tokenize, and continues when allowed to."""

    def __init__(self) -> None:
        self.tokenized: list[str] = []
        self.may_continue = threading.Event()
        self.may_continue.set()
        super().__init__(FakeBackend({}), [SpecialToken("<|im_start|>", True)])

    def tokenize(self, text: str, special: bool) -> list[int]:
        self.tokenized.append(text)
        assert self.may_continue.wait(30)
        return super().tokenize(text, special)


@pytest.fixture
def backend() -> GatedBackend:
    return GatedBackend()


@pytest.fixture
async def bus(nats_url: str, backend: GatedBackend) -> AsyncIterator[Bus]:
    async with Bus.connect(nats_url, "test") as bus:
        template = ChatTemplate(CHATML, backend, bos="<|im_start|>", eos="", adds_bos=True)
        service = TokenService(bus, "w", LoadedModel(INFO, backend, template), LIMITS)
        await service.start()
        yield bus
        await service.close()
        with pytest.raises(ServiceError, match="shutting down"):
            await ids(bus, TokenizeRequest("a"))


async def ids(bus: Bus, request: TokenizeRequest) -> list[int]:
    found = await bus.request(
        subjects.tokenize("w", "ann"), request, TokenizeReply, 2 * TOKENS_TIMEOUT_SECONDS
    )
    return list(found.tokens)


async def test_text_is_tokenized_and_detokenized(bus: Bus) -> None:
    request = TokenizeRequest("é!", with_pieces=True)
    found = await bus.request(subjects.tokenize("w", "ann"), request, TokenizeReply)
    assert [piece.bytes for piece in found.pieces] == [(0xC3,), (0xA9,), (33,)]
    assert found.pieces[2].text == "!"
    assert found.tokens == tuple(piece.id for piece in found.pieces)
    detokenize = DetokenizeRequest(found.tokens)
    back = await bus.request(subjects.detokenize("w", "ann"), detokenize, DetokenizeReply)
    assert back.text == "é!"


async def test_control_tokens_are_parsed_and_added_on_request(bus: Bus) -> None:
    text = "<|im_start|>a"
    assert await ids(bus, TokenizeRequest(text)) == [ADDED, 97]
    assert len(await ids(bus, TokenizeRequest(text, parse_special=False))) == len(text)
    assert await ids(bus, TokenizeRequest("a", add_special=True)) == [ADDED, 97]
    typed = await ids(bus, TokenizeRequest(text, add_special=True, parse_special=False))
    assert typed == [ADDED, *text.encode()]


async def test_pieces_of_a_long_text_are_rejected(bus: Bus) -> None:
    text = "a" * 100_000
    assert len(await ids(bus, TokenizeRequest(text))) == len(text)
    with pytest.raises(ServiceError, match="fit into one message"):
        await ids(bus, TokenizeRequest(text, with_pieces=True))


def test_limit_of_pieces_is_what_fits_into_a_message_of_usual_words() -> None:
    count = LIMITS.max_token_pieces
    piece = TokenPiece(279, " the", tuple(b" the"))
    reply = TokenizeReply((piece.id,) * count, (piece,) * count)
    assert 0.9 * LIMITS.max_payload < len(encode(reply)) <= LIMITS.max_payload


async def test_unknown_token_is_rejected(bus: Bus) -> None:
    with pytest.raises(ServiceError, match="The field `tokens` has the token 300"):
        await bus.request(
            subjects.detokenize("w", "ann"), DetokenizeRequest((300,)), DetokenizeReply
        )


async def test_count_includes_conversations_over_the_window(bus: Bus) -> None:
    for length in (1, 5000):
        request = ChatRequest(messages=(ChatMessage("user", "x" * length),))
        counted = await bus.request(subjects.count("w", "ann"), request, TokenCount)
        assert counted.tokens == len("user\n<|im_end|>\nassistant\n") + 2 + length


async def test_concurrent_requests_are_all_answered(bus: Bus) -> None:
    found = await asyncio.gather(*(ids(bus, TokenizeRequest(str(n))) for n in range(8)))
    assert [bytes(tokens).decode() for tokens in found] == [str(n) for n in range(8)]


async def occupy(bus: Bus, backend: GatedBackend) -> asyncio.Task[list[int]]:
    """Occupy the thread until the backend may continue."""
    backend.may_continue.clear()
    running = asyncio.create_task(ids(bus, TokenizeRequest("first")))
    while "first" not in backend.tokenized:
        await asyncio.sleep(0.01)
    return running


async def test_request_to_a_full_queue_is_rejected_at_once(bus: Bus, backend: GatedBackend) -> None:
    running = await occupy(bus, backend)
    asking = [
        asyncio.create_task(ids(bus, TokenizeRequest(f"{i}")))
        for i in range(LIMITS.token_queue + 5)
    ]
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    rejected = done.pop().exception()
    assert isinstance(rejected, ServiceError) and rejected.code == "overloaded"
    assert "queue is full" in rejected.message and rejected.retry_after
    backend.may_continue.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(answer, list) for answer in answers) == LIMITS.token_queue
    assert bytes(await running).decode() == "first"


async def test_timed_out_request_never_starts(bus: Bus, backend: GatedBackend) -> None:
    running = await occupy(bus, backend)
    request = TokenizeRequest("too late")
    with pytest.raises(ServiceError, match="too many requests to count tokens"):
        await ids(bus, request)
    backend.may_continue.set()
    assert isinstance(*await asyncio.gather(running, return_exceptions=True), ServiceError)
    await ids(bus, TokenizeRequest("next"))
    assert backend.tokenized[-1] == "next" and "too late" not in backend.tokenized
