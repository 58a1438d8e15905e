"""A parser of a simple format: `<think>…</think>`, content, and `<call>name {…}</call>`."""

from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    Channel,
    ContentDelta,
    ReasoningDelta,
)

TAGS = ("<think>", "</think>", "<call>", "</call>")


class TagParser:
    """Implements AnswerParser. Tags are found anywhere; a name ends at its first space."""

    def __init__(self, channel: Channel = "content") -> None:
        self.channel = channel
        self._pending = ""
        self._is_name = False
        self._length = 0
        self.ends: list[int] = []

    @property
    def held_length(self) -> int:
        return len(self._pending)

    @property
    def can_open_thought(self) -> bool:
        return self.channel == "content"

    @property
    def is_within_call(self) -> bool:
        return self.channel == "tool_call"

    def push(self, text: str) -> list[AnswerPart]:
        self._pending += text
        self._length += len(text)
        parts: list[AnswerPart] = []
        self.ends = []
        while (at := self._pending.find("<")) >= 0 or self._is_name:
            if self._is_name:
                name, space, rest = self._pending.partition(" ")
                if not space:
                    return parts
                self._pending, self._is_name = rest, False
                parts.append(CallStart(name))
                self.ends.append(self._length - len(rest))
                continue
            parts += self._take(at)
            tag = next((tag for tag in TAGS if self._pending.startswith(tag)), None)
            if tag:
                self._pending = self._pending.removeprefix(tag)
                self._is_name = tag == "<call>"
                self.channel = {"<think>": "reasoning", "<call>": "tool_call"}.get(tag, "content")  # type: ignore[assignment]
            elif any(tag.startswith(self._pending) for tag in TAGS):
                return parts
            else:
                parts += self._take(1)
        return parts + self._take(len(self._pending))

    def flush(self) -> list[AnswerPart]:
        self.ends = []
        if self._is_name:
            self._pending = ""
        return self._take(len(self._pending))

    def _take(self, length: int) -> list[AnswerPart]:
        text, self._pending = self._pending[:length], self._pending[length:]
        kinds: dict[Channel, type[AnswerPart]] = {
            "content": ContentDelta,
            "reasoning": ReasoningDelta,
            "tool_call": ArgumentsDelta,
        }
        if not text:
            return []
        self.ends.append(self._length - len(self._pending))
        return [kinds[self.channel](text)]
