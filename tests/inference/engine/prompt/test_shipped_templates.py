"""
The chat templates that llama.cpp ships, on real vocabularies: no text forges a role, no text is
lost, and the next prompt continues the tokens of the last turn.
"""

from collections.abc import Iterator
from itertools import pairwise
from os.path import commonprefix
from typing import Literal, NamedTuple

import pytest

from services.contract.conversation import ChatMessage
from services.contract.messages import Turn
from services.inference.engine.backend import Backend
from services.inference.engine.prompt.template_renderer import TemplateError
from tests.inference.engine.prompt.shipped_templates import (
    CASES,
    OWN_VOCABULARY,
    REJECTED,
    SOURCES,
    USABLE,
    VOCABULARIES,
    Case,
    case,
    hostile,
)
from tests.inference.vocabulary import load_vocabulary, text_of

MAX_TOKEN_BYTES = 32

# Templates that render a past answer after another text than the prompt for it ended with, so the
# next prompt can't continue its tokens: the prompt opens a reasoning block or a channel, which is
# left out later;
NOT_CONTINUING = (
    {
        "Apriel-1.6-15b-Thinker-fixed",
        "Cohere2MoE",
        "CohereForAI-c4ai-command-r-plus-tool_use",
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "MiniMax-M2",
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "NVIDIA-Nemotron-Nano-v2",
        "Qwen-QwQ-32B",
        "Qwen3.5-4B",
        "StepFun3.5-Flash",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "deepseek-ai-DeepSeek-V3.2",
        "google-gemma-4-31B-it",
        "google-gemma-4-31B-it-interleaved",
        "llama-cpp-deepseek-r1",
    }
    | {  # the model opens it, or generates a word or a space that the template writes later;
        "GLM-4.6",
        "GLM-4.7-Flash",
        "Kimi-K2-Thinking",
        "Kimi-K3",
        "MiniMax-M3",
        "Reka-Edge",
        "Spark2.5",
        "inclusionai-ling-3.0-flash",
        "llama-cpp-rwkv-world",
        "meetkai-functionary-medium-v3.2",
        "muse-glimmer",
        "openai-gpt-oss-120b",
        "poolside-Laguna-S-2.1",
        "poolside-Laguna-XS-2.1",
        "poolside-Laguna-XS.2",
        "upstage-Solar-Open-100B",
    }
    | {"mistralai-Mistral-Nemo-Instruct-2407"}
)  # or the system prompt moves to the last question


@pytest.mark.parametrize("name", SOURCES)
def test_template_is_rejected_only_for_a_known_reason(name: str) -> None:
    if name not in REJECTED:
        case(name, "qwen2")
        return
    with pytest.raises(TemplateError, match=REJECTED[name]):
        case(name, "qwen2")


def test_all_shipped_templates_are_tested() -> None:
    assert len(SOURCES) == 70, "deploy/setup.sh llama-source gets them"
    assert SOURCES.keys() >= REJECTED.keys() | OWN_VOCABULARY.keys()


def test_tokens_found_by_their_text_are_special_tokens() -> None:
    for name in VOCABULARIES:
        texts = {token.text for token in load_vocabulary(name).special_tokens().values()}
        for text in ("<unk>", "<s>", "</s>", "<bos>", "<|im_start|>", "<|turn>"):
            is_found = len(load_vocabulary(name).tokenize(text, special=True)) == 1
            assert is_found == (text in texts)


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_no_text_becomes_a_reserved_token(name: str, vocabulary_name: str) -> None:
    here = case(name, vocabulary_name)
    innocent = here.reserved_in(here.tokens("x"))
    for contents in hostile(here):
        tokens = here.tokens(*contents)
        assert here.reserved_in(tokens) == innocent, contents
        text = here.readable(text_of(here.backend, tokens))
        for content in contents:
            assert here.readable(content).strip() in text


def spell(backend: Backend, text: str) -> list[int]:
    """Return a token per letter, unlike the tokenizer."""
    tokens = [backend.tokenize(f"\n{letter}", special=False)[-1] for letter in text]
    assert text_of(backend, tokens) == text
    assert len(tokens) > len(backend.tokenize(text, special=False))
    return tokens


class PromptAndAnswer(NamedTuple):
    """A prompt with its answer, as tokens and as text."""

    tokens: list[int]
    text: bytes


def converse(case: Case) -> Iterator[PromptAndAnswer]:
    turns: list[Turn] = []
    answers: dict[str, list[int]] = {}
    for question in ("What is it?", "  spaces  ", case.text("x"), "And then?"):
        prompt = case.chat.session_prompt("be kind", turns, question, 1, answers).tokens
        rendered = bytes(case.rendered.session_prompt("be kind", turns, question, 1).tokens)
        answer = f"Answer-number-{len(turns)}"
        answers[answer] = spell(case.backend, answer)
        yield PromptAndAnswer(prompt + answers[answer], rendered + answer.encode())
        turns.append(Turn(answer, question, answer))


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_next_prompt_continues_the_tokens_of_the_last_turn(name: str, vocabulary_name: str) -> None:
    continues = []
    for before, after in pairwise(converse(case(name, vocabulary_name))):
        continues.append(after.text.startswith(before.text))
        if continues[-1]:
            assert after.tokens[: len(before.tokens)] == before.tokens
    assert all(continues) == (name not in NOT_CONTINUING)


@pytest.mark.parametrize("name", USABLE)
def test_equal_text_has_equal_tokens(name: str) -> None:
    here = case(name, "qwen2")
    for before, after in pairwise(converse(here)):
        text = commonprefix([before.text, after.text])
        tokens = commonprefix([before.tokens, after.tokens])
        assert len(text_of(here.backend, tokens).encode()) >= len(text) - MAX_TOKEN_BYTES


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_shared_prefix_contains_no_question(name: str, vocabulary_name: str) -> None:
    here = case(name, vocabulary_name)
    questions = ("What is it?", "2 and 2", "¿Qué?", "数える", "- a list\n- of two")
    prompts = [
        here.chat.session_prompt("be kind", (), question, 1).tokens for question in questions
    ]
    head = here.chat.public_prefixes("be kind")[0]
    assert all(prompt[: len(head)] == head for prompt in prompts)
    assert len(commonprefix(prompts)) - len(head) <= 1, "nearly all that they have in common"


@pytest.mark.parametrize("name", USABLE)
def test_conversation_has_at_least_a_token_per_message(name: str) -> None:
    here = case(name, "qwen2")
    for count in (1, 3, 9):
        roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
        messages = [ChatMessage(roles[i % 2], "a") for i in range(count)]
        assert len(here.chat.tokenize_conversation(messages, ())) >= count
