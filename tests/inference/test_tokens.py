"""What a worker tells of tokens, on a real bus."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from services.contract import subjects
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
)
from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.models import LoadedModel
from services.inference.tokens import QUEUE, TokenService
from services.runtime.bus import Bus
from tests.inference.engine.prompt.test_chat_template import CHATML
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import ADDED, WithMarkers

INFO = ModelInfo("fake", "digest", 1000, 0)


class Slow(WithMarkers):
    """Records what it has to tokenize, and continues when allowed to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        super().__init__(FakeBackend({}), [SpecialToken("<|im_start|>", True)])

    def tokenize(self, text: str, special: bool) -> list[int]:
        self.seen.append(text)
        assert self.may_go_on.wait(30)
        return super().tokenize(text, special)


@pytest.fixture
def backend() -> Slow:
    return Slow()


@pytest.fixture
async def bus(nats_url: str, backend: Slow) -> AsyncIterator[Bus]:
    async with Bus.connect(nats_url, "test") as bus:
        template = ChatTemplate(CHATML, backend, bos="<|im_start|>", eos="", adds_bos=True)
        service = TokenService(bus, "w", LoadedModel(INFO, backend, template, (INFO,)))
        await service.open()
        yield bus
        await service.close()
        with pytest.raises(ServiceError, match="shutting down"):
            await ids(bus, TokenizeRequest("a"))


async def ids(bus: Bus, request: TokenizeRequest) -> list[int]:
    found = await bus.request(
        subjects.tokenize("w"), request, TokenizeReply, 2 * TOKENS_TIMEOUT_SECONDS
    )
    return list(found.tokens)


async def test_a_text_is_told_as_tokens_and_back(bus: Bus) -> None:
    asked = TokenizeRequest("é!", with_pieces=True)
    found = await bus.request(subjects.tokenize("w"), asked, TokenizeReply)
    assert [piece.bytes for piece in found.pieces] == [(0xC3,), (0xA9,), (33,)]
    assert found.pieces[2].text == "!"
    assert found.tokens == tuple(piece.id for piece in found.pieces)
    asked_back = DetokenizeRequest(found.tokens)
    back = await bus.request(subjects.detokenize("w"), asked_back, DetokenizeReply)
    assert back.text == "é!"


async def test_control_tokens_are_found_and_put_first_where_asked_for(bus: Bus) -> None:
    text = "<|im_start|>a"
    assert await ids(bus, TokenizeRequest(text)) == [ADDED, 97]
    assert len(await ids(bus, TokenizeRequest(text, parse_special=False))) == len(text)
    assert await ids(bus, TokenizeRequest("a", add_special=True)) == [ADDED, 97]
    typed = await ids(bus, TokenizeRequest(text, add_special=True, parse_special=False))
    assert typed == [ADDED, *text.encode()]


async def test_a_long_text_is_told_but_not_its_pieces(bus: Bus) -> None:
    text = "a" * 100_000
    assert len(await ids(bus, TokenizeRequest(text))) == len(text)
    with pytest.raises(ServiceError, match="fit into one message"):
        await ids(bus, TokenizeRequest(text, with_pieces=True))


async def test_a_token_that_there_is_not_is_refused(bus: Bus) -> None:
    with pytest.raises(ServiceError, match="The field `tokens` has 300"):
        await bus.request(subjects.detokenize("w"), DetokenizeRequest((300,)), DetokenizeReply)


async def test_a_conversation_is_counted_also_where_it_does_not_fit(bus: Bus) -> None:
    for length in (1, 5000):
        request = ChatRequest(messages=(ChatMessage("user", "x" * length),))
        counted = await bus.request(subjects.count("w"), request, TokenCount)
        assert counted.tokens == len("user\n<|im_end|>\nassistant\n") + 2 + length


async def test_many_at_once_are_all_answered(bus: Bus) -> None:
    found = await asyncio.gather(*(ids(bus, TokenizeRequest(str(n))) for n in range(50)))
    assert [bytes(tokens).decode() for tokens in found] == [str(n) for n in range(50)]


async def occupy(bus: Bus, backend: Slow) -> asyncio.Task[list[int]]:
    """Occupy the thread until the backend may continue."""
    backend.may_go_on.clear()
    running = asyncio.create_task(ids(bus, TokenizeRequest("first")))
    while "first" not in backend.seen:
        await asyncio.sleep(0.01)
    return running


async def test_what_the_queue_has_no_room_for_is_refused_at_once(bus: Bus, backend: Slow) -> None:
    running = await occupy(bus, backend)
    asked = [asyncio.create_task(ids(bus, TokenizeRequest(f"{i}"))) for i in range(QUEUE + 5)]
    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    refused = done.pop().exception()
    assert isinstance(refused, ServiceError) and refused.code == "overloaded"
    assert "queue is full" in refused.message and refused.retry_after
    backend.may_go_on.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, list) for answer in answers) == QUEUE
    assert bytes(await running).decode() == "first"


async def test_abandoned_token_count_never_starts(bus: Bus, backend: Slow) -> None:
    running = await occupy(bus, backend)
    request = TokenizeRequest("too late")
    with pytest.raises(ServiceError, match="too many requests to count tokens"):
        await ids(bus, request)
    backend.may_go_on.set()
    assert isinstance(*await asyncio.gather(running, return_exceptions=True), ServiceError)
    await ids(bus, TokenizeRequest("next"))
    assert backend.seen[-1] == "next" and "too late" not in backend.seen
