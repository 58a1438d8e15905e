"""
Assembles the tokens of a prompt from a rendered conversation.

Text written by people or by the model never becomes a reserved token, and an answer whose tokens
are known contributes exactly these tokens, so that the prompt continues what the KV cache holds
even where tokenizing the answer's text would give other tokens.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple

from services.inference.engine.prompt.template_process import RenderFailure
from services.inference.engine.prompt.template_renderer import (
    REASONING,
    Json,
    Placeholders,
    TemplateRenderer,
)
from services.inference.engine.prompt.tokenizer import AnswerMatch, Tokenizer

CONTENT = "content"
MAX_SHAPES = 256  # of conversations whose skeletons are cached: some kilobytes each
MAX_SHAPE_CHARS = 2**14


class TemplateMessage(NamedTuple):
    """A message as a template gets it."""

    role: str
    content: str
    tokens: Sequence[int] = ()  # of a generated answer, if they are known
    fields: Mapping[str, Any] = MappingProxyType({})  # further ones, such as tool calls and a name
    reasoning_tokens: Sequence[int] = ()  # of fields[REASONING], if they are known


Slot = tuple[int, str]
"""Where a text of a message stands in a prompt: the index of the message, and the field."""


class _Conversation(NamedTuple):
    """
    Placeholders in tools and fields stand for `hidden`: names of reserved tokens. The prompt ends
    behind `open_slot`, if there is one, so that the model continues its text.
    """

    messages: list[TemplateMessage]
    tools: Sequence[Json]
    hidden: list[str]
    variables: Mapping[str, Any]
    open_slot: Slot | None

    @property
    def texts(self) -> dict[Slot, str]:
        """The texts of all messages, in the order in which templates write them."""
        found: dict[Slot, str] = {}
        for i, message in enumerate(self.messages):
            if REASONING in message.fields:
                found[i, REASONING] = message.fields[REASONING]
            if message.content or "tool_calls" not in message.fields:
                found[i, CONTENT] = message.content
        return found

    @property
    def has_texts_only(self) -> bool:
        """Whether the skeleton depends only on roles and the template's variables."""
        has_more = any(message.fields.keys() - {REASONING} for message in self.messages)
        return not (has_more or self.tools or self.hidden or self.open_slot)

    def with_texts(self, texts: Mapping[Slot, str]) -> list[Json]:
        """Return the messages for the template, with these texts instead of their own."""
        messages = []
        for i, message in enumerate(self.messages):
            content = texts.get((i, CONTENT), message.content)
            written: Json = {"role": message.role, "content": content, **message.fields}
            if (i, REASONING) in texts:
                written[REASONING] = texts[i, REASONING]
            messages.append(written)
        return messages


class _Segment(NamedTuple):
    """The rendered text between two known answers, and the same with placeholders for contents."""

    text: str | None  # None if the template fails on the contents
    skeleton: str


_Answers = dict[Slot, AnswerMatch]  # the known answers and thoughts


class PromptAssembler:
    """Turns conversations into prompt tokens, for one template and one tokenizer."""

    def __init__(self, renderer: TemplateRenderer, tokenizer: Tokenizer) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._contents, self._answers, self._hidden = (Placeholders() for _ in range(3))
        self._end = Placeholders()[0]
        self._skeleton_of = lru_cache(MAX_SHAPES)(self._render_shape)
        self._reserved_in = lru_cache(MAX_SHAPES)(self._find_reserved)

    def tokens(
        self,
        messages: list[TemplateMessage],
        tools: Sequence[Json] = (),
        require_all: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        open_field: str = "",
    ) -> list[int]:
        """
        Return the prompt of a conversation. With `require_all`, raise ValueError if the template
        leaves out a message; the text of a message with tool calls may be left out.

        With `open_field`, `content` or REASONING, the prompt ends behind this text of the last
        message. Raises ValueError if the template can't show it there.
        """
        conversation = self._prepare(messages, tools, variables, open_field)
        segments, answers = self._split(conversation)
        if require_all:
            self._check_all_rendered(conversation, segments)
        texts = conversation.texts | {slot: answer.rest for slot, answer in answers.items()}
        contents = list(texts.values())
        tokens: list[int] = []
        for segment, known in zip_longest(segments, answers.values()):
            self._append(tokens, segment, contents, conversation)
            tokens += known.tokens if known else []
        return tokens

    def _prepare(
        self,
        messages: list[TemplateMessage],
        tools: Sequence[Json],
        variables: Mapping[str, Any],
        open_field: str,
    ) -> _Conversation:
        """Merge the system prompt, if the template has no system role, and hide reserved names."""
        hidden: list[str] = []

        def hide(name: str) -> str:
            hidden.append(name)
            return self._hidden[len(hidden) - 1]

        def without_names(message: TemplateMessage) -> TemplateMessage:
            reasoning = {k: v for k, v in message.fields.items() if k == REASONING}
            return message._replace(fields=replace(dict(message.fields), hide) | reasoning)

        messages = messages if self._renderer.has_system_role else _merge_system(messages)
        replace = self._tokenizer.replace_names
        messages = [without_names(message) for message in messages]
        variables = replace(dict(variables), hide)
        open_slot = (len(messages) - 1, open_field) if open_field else None
        return _Conversation(messages, replace(list(tools), hide), hidden, variables, open_slot)

    def _render(self, conversation: _Conversation, texts: Mapping[Slot, str]) -> str:
        """Return the rendered messages with these texts, up to the end of the open one."""
        slot = conversation.open_slot
        if slot is None:
            messages = conversation.with_texts(texts)
            return self._renderer.render(messages, conversation.tools, conversation.variables)
        own = texts.get(slot, conversation.texts[slot])
        messages = conversation.with_texts({**texts, slot: own + self._end})
        rendered = self._renderer.render(
            messages, conversation.tools, conversation.variables, is_prompt=False
        )
        before, end, _ = rendered.partition(self._end)
        if not end:
            raise ValueError("it does not show the message that is to be continued")
        return before

    def _split(self, conversation: _Conversation) -> tuple[list[_Segment], _Answers]:
        """
        Split the rendered conversation at the known answers. An answer is ordinary text if the
        template changes it (trims, say), leaves it out, repeats it, or depends on it elsewhere.
        """

        def skeleton(answers: _Answers) -> str:
            return self._render_skeleton(conversation, self._skeleton(conversation, answers))

        try:
            whole = self._render(conversation, {})
        except RenderFailure:  # because of some content, which must not end a session
            return [_Segment(None, skeleton({}))], {}
        answers = self._known_answers(conversation)
        numbers_of = {slot: number for number, slot in enumerate(conversation.texts)}
        while answers:
            marked = {s: self._answers[numbers_of[s]] + a.rest for s, a in answers.items()}
            texts, found = self._answers.split(self._render(conversation, marked))
            skeletons, order = self._answers.split(skeleton(answers))
            numbers = [numbers_of[slot] for slot in answers]
            if found == order == numbers:
                changed = _changed_answers(whole, texts, answers)
                if not changed:
                    return [_Segment(*pair) for pair in zip(texts, skeletons, strict=True)], answers
            else:
                once = {n for n in numbers if found.count(n) == order.count(n) == 1}
                changed = [slot for slot in answers if numbers_of[slot] not in once]
                changed = changed or list(answers)
            answers = {slot: answer for slot, answer in answers.items() if slot not in changed}
        return [_Segment(whole, skeleton({}))], {}

    def _render_skeleton(self, conversation: _Conversation, texts: Mapping[Slot, str]) -> str:
        """Conversations of the same shape have the same skeleton, which is cached."""
        if self._renderer.is_repeatable and conversation.has_texts_only:
            messages, variables = conversation.with_texts(texts), dict(conversation.variables)
            # the field is found after the first renderings, and changes the text
            shape = json.dumps([messages, variables, self._renderer.reasoning_field])
            if len(shape) <= MAX_SHAPE_CHARS:
                return self._skeleton_of(shape)
        return self._render(conversation, texts)

    def _render_shape(self, shape: str) -> str:
        messages, variables, _ = json.loads(shape)
        return self._renderer.render(messages, (), variables)

    def _known_answers(self, conversation: _Conversation) -> _Answers:
        found: _Answers = {}
        for (i, field), text in conversation.texts.items():
            message = conversation.messages[i]
            tokens = message.tokens if field == CONTENT else message.reasoning_tokens
            found[i, field] = self._tokenizer.match_answer(tokens, text)
        return {slot: answer for slot, answer in found.items() if answer.tokens}

    def _skeleton(self, conversation: _Conversation, answers: _Answers) -> dict[Slot, str]:
        """
        Return placeholders for all texts, so that only the template's own text is left. An empty
        content beside tool calls stays, since templates treat it differently.
        """
        return {
            slot: (self._answers[number] if slot in answers else "") + self._contents[number]
            for number, slot in enumerate(conversation.texts)
        }

    def _check_all_rendered(self, conversation: _Conversation, segments: list[_Segment]) -> None:
        found = {*chain.from_iterable(self._contents.split(each.skeleton)[1] for each in segments)}
        for number, (i, field) in enumerate(conversation.texts):
            message = conversation.messages[i]
            is_open = conversation.open_slot is not None and conversation.open_slot[0] == i
            is_optional = is_open or field == REASONING or "tool_calls" in message.fields
            if number not in found and not is_optional:
                raise ValueError(f"it does not show message {i}, of role {message.role!r}")

    def _append(
        self,
        tokens: list[int],
        segment: _Segment,
        contents: list[str],
        conversation: _Conversation,
    ) -> None:
        """
        Append the tokens of a segment. It is tokenized as a whole, as models were trained, unless
        a content would become a reserved token. Then the contents are tokenized one by one, without
        what the template does to them.
        """
        hidden = tuple(conversation.hidden)
        texts, numbers = self._contents.split(segment.skeleton)
        inner = [contents[i] for i in numbers]
        if segment.text is not None and not any(map(self._tokenizer.names_reserved, inner)):
            start = len(tokens)
            self._append_template(tokens, segment.text, hidden)
            is_common = conversation.has_texts_only and len(segment.skeleton) <= MAX_SHAPE_CHARS
            find = self._reserved_in if is_common else self._find_reserved
            if self._tokenizer.reserved(tokens[start:]) == find(segment.skeleton, hidden):
                return
            del tokens[start:]
        for text, content in zip_longest(texts, inner, fillvalue=""):
            self._append_template(tokens, text, hidden)
            self._tokenizer.append_content(tokens, content)

    def _find_reserved(self, skeleton: str, hidden: tuple[str, ...]) -> list[int]:
        tokens: list[int] = []
        self._append_template(tokens, skeleton, hidden)
        return self._tokenizer.reserved(tokens)

    def _append_template(self, tokens: list[int], text: str, hidden: Sequence[str]) -> None:
        """Append the tokens of the template's text, in which `hidden` are no reserved tokens."""
        texts, numbers = self._hidden.split(text)
        for part, name in zip_longest(texts, (hidden[i] for i in numbers), fillvalue=""):
            self._tokenizer.append(tokens, part, special=True)
            self._tokenizer.append_content(tokens, name)


def _merge_system(messages: list[TemplateMessage]) -> list[TemplateMessage]:
    """Put the system prompt before the text of the first user message."""
    if messages[0].role != "system":
        return messages
    if len(messages) == 1:
        return [messages[0]._replace(role="user")]
    system, first, *rest = messages
    return [first._replace(content=f"{system.content}\n\n{first.content}"), *rest]


def _changed_answers(whole: str, texts: list[str], answers: _Answers) -> list[Slot]:
    """
    Return the answers that do not stand unchanged between these texts in the whole. After a changed
    one the comparison continues where the next text is found.
    """
    if not whole.startswith(texts[0]):
        return list(answers)
    changed: list[Slot] = []
    position = len(texts[0])
    for (slot, answer), text in zip(answers.items(), texts[1:], strict=True):
        if whole.startswith(answer.text + text, position):
            position += len(answer.text + text)
        else:
            changed.append(slot)
            position = max(position, whole.find(text, position)) + len(text)
    return changed if changed or position == len(whole) else list(answers)
