"""Chunks whose frame was encoded before are those that would be encoded anew."""

from collections.abc import Callable

import msgspec
import pytest

from services.contract.messages import Channel, Token
from services.edge.api.completion import CHAT, TEXT, UNIQUE, CompletionEncoder
from services.edge.api.openai_chat import ChatChoiceBuilder
from services.edge.api.openai_completions import TextChoiceBuilder

HEADING = {"id": "chatcmpl-1", "created": 1, "model": "demo", "system_fingerprint": "fp_1"}
TEXTS = ("a", "demo", UNIQUE, '"}\n\n', "\u2028\u2029\x85", "ß😀", "\\u0000text\\u0000")


def chat(includes_reasoning: bool = True, is_resumable: bool = False) -> CompletionEncoder:
    choices = [ChatChoiceBuilder(n, includes_reasoning=includes_reasoning) for n in range(2)]
    return CompletionEncoder(CHAT, HEADING, choices, 2, True, (), is_resumable)


def text() -> CompletionEncoder:
    return CompletionEncoder(TEXT, HEADING, [TextChoiceBuilder(n, "") for n in range(2)], 2, False)


@pytest.mark.parametrize("channel", ["content", "reasoning"])
@pytest.mark.parametrize("make", [chat, text])
def test_text_is_all_that_differs_between_chunks(
    make: Callable[[], CompletionEncoder], channel: Channel
) -> None:
    encoder = make()
    for number in (0, 1):
        for each in TEXTS:
            event = encoder.encode(number, Token(0, each, (1,), channel=channel))
            (chunk,) = encoder._choices[number].chunks(Token(0, each, (1,), channel=channel))
            assert event == encoder._event((chunk,), **encoder._no_usage)
            assert (
                msgspec.json.decode(event.removeprefix(b"data: "))["choices"][0]["index"] == number
            )
            assert event.count(b"\n") == 2 and len(event.decode().splitlines()) == 2


def test_resumable_chunks_have_the_id_of_their_end() -> None:
    encoder = chat(is_resumable=True)
    for offset in (0, 4):
        assert encoder.encode(0, Token(offset, "text", (1,))).startswith(b"id: %d\n" % (offset + 4))


def test_left_out_reasoning_has_no_event() -> None:
    encoder = chat(includes_reasoning=False, is_resumable=True)
    for _ in range(2):
        assert encoder.encode(0, Token(0, "Hm.", (1,), channel="reasoning")) == b""
