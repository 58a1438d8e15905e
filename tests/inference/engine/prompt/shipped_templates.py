"""The chat templates that llama.cpp ships, on real vocabularies."""

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

from services.contract.messages import Turn
from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import LLAMA_CPP, WithSpecialTokens, load_vocabulary

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
_SPECIAL_TOKEN = re.compile(r"<[|｜/]?[^<>\s'\"{}()]{1,40}>|\[/?[A-Z_]{2,30}\]")


class Case(NamedTuple):
    """A template on a vocabulary."""

    chat: ChatTemplate
    backend: WithSpecialTokens
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
    names = sorted({*_SPECIAL_TOKEN.findall(source), *_SPECIAL_TOKEN.findall(sample)} - known)
    added = [] if OWN_VOCABULARY.get(template) == vocabulary_name else names
    backend = WithSpecialTokens(base, (SpecialToken(x, i % 2 == 0) for i, x in enumerate(added)))
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
