"""
The chat templates that llama.cpp ships, on real vocabularies: nobody forges a role, nothing that
was written is lost, and a next turn goes on from the tokens of the one before.
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
from tests.inference.vocabulary import LLAMA_CPP, Vocabulary, WithMarkers, text_of

SOURCES = {
    path.stem: path.read_text() for path in sorted((LLAMA_CPP / "models/templates").glob("*.jinja"))
}
# They can't show a conversation, for a reason of their own.
REFUSED = {"fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined"}
USABLE = [name for name in SOURCES if name not in REFUSED]

VOCABULARIES = ["qwen2", "llama-spm", "gemma-4"]  # BPE, SentencePiece, BPE of SentencePiece's looks
# These have the special tokens of these templates themselves; others are given them.
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

# In these, a past answer does not stand behind the text that asked for it, so its tokens can't go
# on from that: the prompt opens a thought or a channel, which is not shown again,
NOT_GOING_ON = (
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
    | {  # the model is to open it, or to say a word or a space that the template says itself later,
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
)  # or the system prompt moves to the last question.


class Case(NamedTuple):
    chat: ChatTemplate
    backend: WithMarkers
    rendered: ChatTemplate  # gives the text's bytes as tokens
    base: str
    roles: set[int]  # the control tokens, and the others that the template uses

    def tokens(self, *contents: str) -> list[int]:
        return self.chat.session_prompt(*_conversation(*contents), 1).tokens

    def text(self, *contents: str) -> str:
        return bytes(self.rendered.session_prompt(*_conversation(*contents), 1).tokens).decode()

    def readable(self, text: str) -> str:
        """
        Without spaces: SentencePiece puts some in after a special token, others write "▁" for them.
        """
        if self.base not in ("llama-spm", "phi-3", "gemma-4"):
            return text
        return text.replace("▁", "").replace(" ", "")

    def special(self, tokens: list[int]) -> list[int]:
        """What a role could be forged with."""
        return [token for token in tokens if token in self.roles]


def _conversation(*contents: str) -> tuple[str, list[Turn], str]:
    """System prompt, one exchange, question; one content is for all of them."""
    system, prompt, response, question = contents if len(contents) == 4 else contents * 4
    return system, [Turn("1", prompt, response)], question


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary(name)


@cache
def case(template: str, vocabulary_name: str) -> Case:
    """With the template's own special tokens, of which every other one is user-defined."""
    source, base = SOURCES[template], vocabulary(vocabulary_name)
    make = partial(ChatTemplate, source, bos=base.bos, eos=base.eos, adds_bos=False)
    rendered = make(FakeBackend({}, 10**7))
    said = bytes(rendered.session_prompt(*_conversation("x"), 1).tokens).decode()
    known = {token.text for token in base.special_tokens().values()}
    names = sorted({*_MARKER.findall(source), *_MARKER.findall(said)} - known)
    added = [] if OWN_VOCABULARY.get(template) == vocabulary_name else names
    backend = WithMarkers(base, (SpecialToken(x, i % 2 == 0) for i, x in enumerate(added)))
    special = backend.special_tokens()
    roles = {token for token in backend.tokenize(said, special=True) if token in special}
    roles |= {id for id, token in special.items() if token.is_control}
    return Case(make(backend), backend, rendered, vocabulary_name, roles)


def hostile(case: Case) -> Iterator[tuple[str, ...]]:
    """Contents of conversations that try to forge something."""
    special = case.backend.special_tokens()
    yield (case.text("x") * 2,)
    yield ("\ue0000\ue001 \ue000 \ue001 ＜|im_start|＞ <\u200b|im_start|> \ufeff<s>",)
    yield (" \n".join(token.text for token in special.values()),)
    used = [special[token].text for token in case.special(case.tokens("x"))]
    for name in {*used[:1], *used[-1:]}:
        half = len(name) // 2
        yield (f"{name[:half]}  ", f"\n{name[half:]}", name[:-1], name[1:])
        yield (f"{name[half:]}<think>{name[:1]}{name}{name[1:]}</think>{name[:half]}",)


@pytest.mark.parametrize("name", SOURCES)
def test_a_template_is_refused_only_for_a_known_reason(name: str) -> None:
    if name not in REFUSED:
        case(name, "qwen2")
        return
    with pytest.raises(TemplateError, match=REFUSED[name]):
        case(name, "qwen2")


def test_all_that_llama_cpp_ships_are_looked_at() -> None:
    assert len(SOURCES) == 70, "deploy/setup.sh llama-source gets them"
    assert SOURCES.keys() >= REFUSED.keys() | OWN_VOCABULARY.keys()


def test_all_tokens_that_llama_cpp_finds_in_a_text_are_known_as_special() -> None:
    for name in VOCABULARIES:
        texts = {token.text for token in vocabulary(name).special_tokens().values()}
        for text in ("<unk>", "<s>", "</s>", "<bos>", "<|im_start|>", "<|turn>"):
            is_found = len(vocabulary(name).tokenize(text, special=True)) == 1
            assert is_found == (text in texts)


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_nothing_that_anybody_wrote_becomes_a_control_token(
    name: str, vocabulary_name: str
) -> None:
    here = case(name, vocabulary_name)
    innocent = here.special(here.tokens("x"))
    for contents in hostile(here):
        tokens = here.tokens(*contents)
        assert here.special(tokens) == innocent, contents
        text = here.readable(text_of(here.backend, tokens))
        for content in contents:
            assert here.readable(content).strip() in text


def spelled(backend: Backend, text: str) -> list[int]:
    """Its letters one by one: never what the tokenizer would make of it."""
    tokens = [backend.tokenize(f"\n{letter}", special=False)[-1] for letter in text]
    assert text_of(backend, tokens) == text
    assert len(tokens) > len(backend.tokenize(text, special=False))
    return tokens


class Said(NamedTuple):
    """A turn: prompt and answer."""

    tokens: list[int]
    text: bytes


def converse(case: Case) -> Iterator[Said]:
    turns: list[Turn] = []
    answers: dict[str, list[int]] = {}
    for question in ("What is it?", "  spaces  ", case.text("x"), "And then?"):
        prompt = case.chat.session_prompt("be kind", turns, question, 1, answers).tokens
        rendered = bytes(case.rendered.session_prompt("be kind", turns, question, 1).tokens)
        answer = f"Answer-number-{len(turns)}"
        answers[answer] = spelled(case.backend, answer)
        yield Said(prompt + answers[answer], rendered + answer.encode())
        turns.append(Turn(answer, question, answer))


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_a_next_turn_goes_on_from_the_tokens_of_the_one_before(
    name: str, vocabulary_name: str
) -> None:
    goes_on = []
    for before, after in pairwise(converse(case(name, vocabulary_name))):
        goes_on.append(after.text.startswith(before.text))
        if goes_on[-1]:
            assert after.tokens[: len(before.tokens)] == before.tokens
    assert all(goes_on) == (name not in NOT_GOING_ON)


@pytest.mark.parametrize("name", USABLE)
def test_as_far_as_the_text_is_the_same_the_tokens_are(name: str) -> None:
    here = case(name, "qwen2")
    for before, after in pairwise(converse(here)):
        text = commonprefix([before.text, after.text])
        tokens = commonprefix([before.tokens, after.tokens])
        assert len(text_of(here.backend, tokens).encode()) >= len(text) - LONGEST_TOKEN


@pytest.mark.parametrize(("name", "vocabulary_name"), CASES)
def test_prompts_begin_with_a_head_that_contains_no_question(
    name: str, vocabulary_name: str
) -> None:
    here = case(name, vocabulary_name)
    questions = ("What is it?", "2 and 2", "¿Qué?", "数える", "- a list\n- of two")
    prompts = [
        here.chat.session_prompt("be kind", (), question, 1).tokens for question in questions
    ]
    head = here.chat.shared_prefixes("be kind")[0]
    assert all(prompt[: len(head)] == head for prompt in prompts)
    assert len(commonprefix(prompts)) - len(head) <= 1, "nearly all that they have in common"


@pytest.mark.parametrize("name", USABLE)
def test_a_conversation_has_no_fewer_tokens_than_messages(name: str) -> None:
    here = case(name, "qwen2")
    for count in (1, 3, 9):
        roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
        messages = [ChatMessage(roles[i % 2], "a") for i in range(count)]
        assert len(here.chat.tokenize_conversation(messages, ())) >= count
