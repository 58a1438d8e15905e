"""
The tokens of the answers that this worker gave, so that a conversation's next prompt repeats them.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.contract.conversation import ChatMessage
from services.contract.messages import Turn

MOST_TOKENS = 1 << 19  # in all: 2 MB of tokens, and as much again for what is around them
OVERHEAD = 64  # an entry takes the memory of so many tokens, were its answer empty


class Answers:
    """Of most recent use; the oldest are forgotten first. A lost one costs time, nothing else."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most = most_tokens
        self._held = 0
        self._tokens: OrderedDict[tuple[str, str], array[int]] = OrderedDict()

    def remember(self, tenant: str, request_id: str, tokens: Sequence[int]) -> None:
        """`tokens` without the one that ended the answer."""
        self._forget(tenant, request_id)
        self._tokens[tenant, request_id] = array("i", tokens)
        self._held += len(tokens) + OVERHEAD
        while self._held > self._most:
            self._forget(*next(iter(self._tokens)))

    def of(self, tenant: str, turns: Sequence[Turn]) -> dict[str, Sequence[int]]:
        """By request id, those that are known."""
        return self._known(tenant, (turn.request_id for turn in turns))

    def remember_text(self, tenant: str, text: str, tokens: Sequence[int]) -> None:
        """Of an answer that only its text can name, as its caller keeps the conversation."""
        self.remember(tenant, _name(text), tokens)

    def of_texts(self, tenant: str, messages: Sequence[ChatMessage]) -> dict[str, Sequence[int]]:
        """By text, those that are known."""
        texts = {_name(m.text): m.text for m in messages if m.role == "assistant"}
        known = self._known(tenant, texts)
        return {texts[name]: tokens for name, tokens in known.items()}

    def _known(self, tenant: str, names: Iterable[str]) -> dict[str, Sequence[int]]:
        keys = [(tenant, name) for name in names]
        known = [key for key in keys if key in self._tokens]
        for key in known:
            self._tokens.move_to_end(key)
        return {key[1]: self._tokens[key] for key in known}

    def _forget(self, tenant: str, request_id: str) -> None:
        if (tokens := self._tokens.pop((tenant, request_id), None)) is not None:
            self._held -= len(tokens) + OVERHEAD


def _name(text: str) -> str:
    """No request id has a colon."""
    return "text:" + hashlib.sha256(text.encode()).hexdigest()
