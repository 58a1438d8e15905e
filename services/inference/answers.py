"""
The answers that this worker gave: their tokens, and where their prompts began, so that a
conversation's next prompt repeats them and begins alike.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.contract.conversation import ChatMessage
from services.contract.messages import Turn

MOST_TOKENS = 1 << 19  # in all: 2 MB, with what is around them
OVERHEAD = 110  # an entry takes the memory of so many tokens, were its answer empty


class _Given(NamedTuple):
    tokens: Sequence[int]
    since: str


class AnswerTokens:
    """Of most recent use; the oldest are forgotten first. A lost one costs time, nothing else."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most = most_tokens
        self._held = 0
        self._given: OrderedDict[tuple[str, str], _Given] = OrderedDict()

    def remember(
        self, tenant: str, request_id: str, tokens: Sequence[int], since: str = ""
    ) -> None:
        """
        `tokens` without the one that ended the answer; its prompt began with the exchange of the
        request `since`.
        """
        self._forget(tenant, request_id)
        self._given[tenant, request_id] = _Given(array("i", tokens), since)
        self._held += len(tokens) + OVERHEAD
        while self._held > self._most:
            self._forget(*next(iter(self._given)))

    def begin(self, tenant: str, request_id: str, since: str) -> None:
        """The next prompt will begin with the exchange of `since`, whatever this one's did."""
        if given := self._given.get((tenant, request_id)):
            self._given[tenant, request_id] = given._replace(since=since)

    def since(self, tenant: str, turns: Sequence[Turn]) -> str:
        """The request with whose exchange the prompt is to begin as before; "" if it is unknown."""
        given = self._given.get((tenant, turns[-1].request_id)) if turns else None
        return given.since if given else ""

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
        known = [key for key in keys if key in self._given]
        for key in known:
            self._given.move_to_end(key)
        return {key[1]: self._given[key].tokens for key in known}

    def _forget(self, tenant: str, request_id: str) -> None:
        if given := self._given.pop((tenant, request_id), None):
            self._held -= len(given.tokens) + OVERHEAD


def _name(text: str) -> str:
    """No request id has a colon."""
    return "text:" + hashlib.sha256(text.encode()).hexdigest()
