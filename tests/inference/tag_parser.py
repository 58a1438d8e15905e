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

    @property
    def held_length(self) -> int:
        return len(self._pending)

    @property
    def is_within_call(self) -> bool:
        return self.channel == "tool_call"

    def push(self, text: str) -> list[AnswerPart]:
        self._pending += text
        parts: list[AnswerPart] = []
        while (at := self._pending.find("<")) >= 0 or self._is_name:
            if self._is_name:
                name, space, rest = self._pending.partition(" ")
                if not space:
                    return parts
                self._pending, self._is_name = rest, False
                parts.append(CallStart(name))
                continue
            parts += self._parts(self._pending[:at])
            self._pending = self._pending[at:]
            tag = next((tag for tag in TAGS if self._pending.startswith(tag)), None)
            if tag:
                self._pending = self._pending.removeprefix(tag)
                self._is_name = tag == "<call>"
                self.channel = {"<think>": "reasoning", "<call>": "tool_call"}.get(tag, "content")  # type: ignore[assignment]
            elif any(tag.startswith(self._pending) for tag in TAGS):
                return parts
            else:
                parts += self._parts("<")
                self._pending = self._pending[1:]
        parts += self._parts(self._pending)
        self._pending = ""
        return parts

    def flush(self) -> list[AnswerPart]:
        parts = [] if self._is_name else self._parts(self._pending)
        self._pending = ""
        return parts

    def _parts(self, text: str) -> list[AnswerPart]:
        kinds: dict[Channel, type[AnswerPart]] = {
            "content": ContentDelta,
            "reasoning": ReasoningDelta,
            "tool_call": ArgumentsDelta,
        }
        return [kinds[self.channel](text)] if text else []
