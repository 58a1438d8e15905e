"""
The chat templates that llama.cpp ships, on real vocabularies: no text forges a role, no text is
lost, and the next prompt continues the tokens of the last turn.
"""

import re
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from os.path import commonprefix
from typing import Literal, NamedTuple

import pytest

from services.contract.conversation import ChatMessage
from services.contract.messages import Turn
from services.inference.engine.backend import Backend, SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.prompt.template_renderer import TemplateError
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import LLAMA_CPP, WithMarkers, load_vocabulary, text_of

SOURCES = {
    path.stem: path.read_text() for path in sorted((LLAMA_CPP / "models/templates").glob("*.jinja"))
}
# Templates that can't render a conversation, and why.
REJECTED = {"fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined"}
USABLE = [name for name in SOURCES if name not in REJECTED]

VOCABULARIES = ["qwen2", "llama-spm", "gemma-4"]  # BPE, SentencePiece, BPE with "▁" for spaces
# Vocabularies with the template's special tokens; to others they are added.
OWN_VOCABULARY = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "command-r",
    "Qwen-Qwen2.5-7B-Instruct": "qwen2",
    "google-gemma-4-31B-it": "gemma-4",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-bpe",
    "meta-llama-Llama-3.2-3B-Instruct": "llama-bpe",
    "microsoft-Phi-3.5-mini-instruct": "phi-3",
}
CASES = [(name, vocabulary) for vocabulary in VOCABULARIES for name in USABLE]
CASES += [case for case in OWN_VOCABULARY.items() if case not in CASES]
LONGEST_TOKEN = 32  # bytes
_MARKER = re.compile(r"<[|｜/]?[^<>\s'\"{}()]{1,40}>|\[/?[A-Z_]{2,30}\]")

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


class Case(NamedTuple):
    """A template on a vocabulary."""

    chat: ChatTemplate
    backend: WithMarkers
    rendered: ChatTemplate  # with the bytes of the text as tokens
    base: str
    reserved: set[int]  # the control tokens, and the others that the template uses

    def tokens(self, *contents: str) -> list[int]:
        return self.chat.session_prompt(*_conversation(*contents), 1).tokens

    def text(self, *contents: str) -> str:
        return bytes(self.rendered.session_prompt(*_conversation(*contents), 1).tokens).decode()

    def readable(self, text: str) -> str:
        """
        Return the text without spaces: SentencePiece inserts some after a special token, and other
        tokenizers write "▁" for them.
        """
        if self.base not in ("llama-spm", "phi-3", "gemma-4"):
            return text
        return text.replace("▁", "").replace(" ", "")

    def reserved_in(self, tokens: list[int]) -> list[int]:
        """Return the tokens that could forge a role."""
        return [token for token in tokens if token in self.reserved]


def _conversation(*contents: str) -> tuple[str, list[Turn], str]:
    """Return system prompt, one exchange and question; a single content is used for all."""
    system, prompt, response, question = contents if len(contents) == 4 else contents * 4
    return system, [Turn("1", prompt, response)], question


@cache
def case(template: str, vocabulary_name: str) -> Case:
    """Add the template's special tokens to the vocabulary, every other one as user-defined."""
    source, base = SOURCES[template], load_vocabulary(vocabulary_name)
    make = partial(ChatTemplate, source, bos=base.bos, eos=base.eos, adds_bos=False)
    rendered = make(FakeBackend({}, 10**7))
    sample = bytes(rendered.session_prompt(*_conversation("x"), 1).tokens).decode()
    known = {token.text for token in base.special_tokens().values()}
    names = sorted({*_MARKER.findall(source), *_MARKER.findall(sample)} - known)
    added = [] if OWN_VOCABULARY.get(template) == vocabulary_name else names
    backend = WithMarkers(base, (SpecialToken(x, i % 2 == 0) for i, x in enumerate(added)))
    special = backend.special_tokens()
    reserved = {token for token in backend.tokenize(sample, special=True) if token in special}
    reserved |= {id for id, token in special.items() if token.is_control}
    return Case(make(backend), backend, rendered, vocabulary_name, reserved)


def hostile(case: Case) -> Iterator[tuple[str, ...]]:
    """Yield contents of conversations that try to forge reserved tokens."""
    special = case.backend.special_tokens()
    yield (case.text("x") * 2,)
    yield ("\ue0000\ue001 \ue000 \ue001 ＜|im_start|＞ <\u200b|im_start|> \ufeff<s>",)
    yield (" \n".join(token.text for token in special.values()),)
    used = [special[token].text for token in case.reserved_in(case.tokens("x"))]
    for name in {*used[:1], *used[-1:]}:
        half = len(name) // 2
        yield (f"{name[:half]}  ", f"\n{name[half:]}", name[:-1], name[1:])
        yield (f"{name[half:]}<think>{name[:1]}{name}{name[1:]}</think>{name[:half]}",)


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
def test_text_of_people_never_becomes_a_reserved_token(name: str, vocabulary_name: str) -> None:
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


class Turns(NamedTuple):
    """A prompt with its answer, as tokens and as text."""

    tokens: list[int]
    text: bytes


def converse(case: Case) -> Iterator[Turns]:
    turns: list[Turn] = []
    answers: dict[str, list[int]] = {}
    for question in ("What is it?", "  spaces  ", case.text("x"), "And then?"):
        prompt = case.chat.session_prompt("be kind", turns, question, 1, answers).tokens
        rendered = bytes(case.rendered.session_prompt("be kind", turns, question, 1).tokens)
        answer = f"Answer-number-{len(turns)}"
        answers[answer] = spell(case.backend, answer)
        yield Turns(prompt + answers[answer], rendered + answer.encode())
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
        assert len(text_of(here.backend, tokens).encode()) >= len(text) - LONGEST_TOKEN


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_shared_prefix_contains_no_question(name: str, vocabulary_name: str) -> None:
    here = case(name, vocabulary_name)
    questions = ("What is it?", "2 and 2", "¿Qué?", "数える", "- a list\n- of two")
    prompts = [
        here.chat.session_prompt("be kind", (), question, 1).tokens for question in questions
    ]
    head = here.chat.shared_prefixes("be kind")[0]
    assert all(prompt[: len(head)] == head for prompt in prompts)
    assert len(commonprefix(prompts)) - len(head) <= 1, "nearly all that they have in common"


@pytest.mark.parametrize("name", USABLE)
def test_conversation_has_at_least_a_token_per_message(name: str) -> None:
    here = case(name, "qwen2")
    for count in (1, 3, 9):
        roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
        messages = [ChatMessage(roles[i % 2], "a") for i in range(count)]
        assert len(here.chat.tokenize_conversation(messages, ())) >= count
