"""
Assembles the tokens of a prompt from a rendered conversation.

Text written by people or by the model never becomes a reserved token, and an answer whose tokens
are known contributes exactly these tokens, so that the prompt continues what the KV cache holds
even where tokenizing the answer's text would give other tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple

from services.inference.engine.prompt.template_renderer import Json, Placeholders, TemplateRenderer
from services.inference.engine.prompt.tokenizer import AnswerMatch, Tokenizer


class TemplateMessage(NamedTuple):
    """A message as a template gets it."""

    role: str
    content: str
    tokens: Sequence[int] = ()  # of a generated answer, if they are known
    fields: Mapping[str, Any] = MappingProxyType({})  # further ones, such as tool calls and a name


class _Conversation(NamedTuple):
    """Placeholders in tools and fields stand for `hidden`: names of reserved tokens."""

    messages: list[TemplateMessage]
    tools: Sequence[Json]
    hidden: list[str]
    variables: Mapping[str, Any]


class _Segment(NamedTuple):
    """The rendered text between two known answers, and the same with placeholders for contents."""

    text: str | None  # None if the template fails on the contents
    skeleton: str


_Answers = dict[int, AnswerMatch]  # the known answers by the index of their message


class PromptAssembler:
    """Turns conversations into prompt tokens, for one template and one tokenizer."""

    def __init__(self, renderer: TemplateRenderer, tokenizer: Tokenizer) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._contents, self._answers, self._hidden = (Placeholders() for _ in range(3))

    def tokens(
        self,
        messages: list[TemplateMessage],
        tools: Sequence[Json] = (),
        require_all: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """
        Return the prompt of a conversation. With `require_all`, raise ValueError if the template
        leaves out a message; the text of a message with tool calls may be left out.
        """
        conversation = self._prepare(messages, tools, variables)
        segments, answers = self._split(conversation)
        if require_all:
            self._check_all_rendered(conversation.messages, segments)
        contents = [message.content for message in conversation.messages]
        for i, answer in answers.items():
            contents[i] = answer.rest
        tokens: list[int] = []
        for segment, known in zip_longest(segments, answers.values()):
            self._append(tokens, segment, contents, conversation.hidden)
            tokens += known.tokens if known else []
        return tokens

    def _prepare(
        self,
        messages: list[TemplateMessage],
        tools: Sequence[Json],
        variables: Mapping[str, Any],
    ) -> _Conversation:
        """Merge the system prompt, if the template has no system role, and hide reserved names."""
        hidden: list[str] = []

        def hide(name: str) -> str:
            hidden.append(name)
            return self._hidden[len(hidden) - 1]

        messages = messages if self._renderer.has_system_role else _merge_system(messages)
        replace = self._tokenizer.replace_names
        messages = [m._replace(fields=replace(dict(m.fields), hide)) for m in messages]
        variables = replace(dict(variables), hide)
        return _Conversation(messages, replace(list(tools), hide), hidden, variables)

    def _split(self, conversation: _Conversation) -> tuple[list[_Segment], _Answers]:
        """
        Split the rendered conversation at the known answers. An answer is ordinary text if the
        template changes it (trims, say), repeats it, or depends on it elsewhere.
        """
        messages = conversation.messages

        def render(messages: list[TemplateMessage]) -> str:
            dicts = [{"role": m.role, "content": m.content, **m.fields} for m in messages]
            return self._renderer.render(dicts, conversation.tools, conversation.variables)

        try:
            whole = render(messages)
        except Exception:  # because of some content, which must not end a session
            return [_Segment(None, render(self._skeleton(messages, {})))], {}
        answers = self._known_answers(messages)
        while answers:
            texts, numbers = self._answers.split(render(self._with_placeholders(messages, answers)))
            skeletons, order = self._answers.split(render(self._skeleton(messages, answers)))
            is_each_once = numbers == order == list(answers)
            changed = _changed_answers(whole, texts, answers) if is_each_once else answers.keys()
            if not changed:
                return [_Segment(*pair) for pair in zip(texts, skeletons, strict=True)], answers
            answers = {i: answer for i, answer in answers.items() if i not in changed}
        return [_Segment(whole, render(self._skeleton(messages, {})))], {}

    def _known_answers(self, messages: list[TemplateMessage]) -> _Answers:
        found = {
            i: self._tokenizer.match_answer(message.tokens, message.content)
            for i, message in enumerate(messages)
        }
        return {i: answer for i, answer in found.items() if answer.tokens}

    def _with_placeholders(
        self, messages: list[TemplateMessage], answers: _Answers
    ) -> list[TemplateMessage]:
        """Replace the known answers by placeholders, but not the text after their tokens."""
        return [
            m._replace(content=self._answers[i] + answers[i].rest) if i in answers else m
            for i, m in enumerate(messages)
        ]

    def _skeleton(
        self, messages: list[TemplateMessage], answers: _Answers
    ) -> list[TemplateMessage]:
        """
        Replace contents too, so that only the template's own text is left. An empty content beside
        tool calls stays, since templates treat it differently.
        """
        return [
            m._replace(content=(self._answers[i] if i in answers else "") + self._contents[i])
            if m.content or "tool_calls" not in m.fields
            else m
            for i, m in enumerate(messages)
        ]

    def _check_all_rendered(
        self, messages: list[TemplateMessage], segments: list[_Segment]
    ) -> None:
        found = chain.from_iterable(self._contents.split(each.skeleton)[1] for each in segments)
        missing = set(range(len(messages))).difference(found)
        for i in sorted(missing):
            if "tool_calls" not in messages[i].fields:
                raise ValueError(f"it does not show message {i}, of role {messages[i].role!r}")

    def _append(
        self, tokens: list[int], segment: _Segment, contents: list[str], hidden: list[str]
    ) -> None:
        """
        Append the tokens of a segment. It is tokenized as a whole, as models were trained, unless
        a content would become a reserved token. Then the contents are tokenized one by one, without
        what the template does to them.
        """
        texts, numbers = self._contents.split(segment.skeleton)
        inner = [contents[i] for i in numbers]
        if segment.text is not None and not any(map(self._tokenizer.names_reserved, inner)):
            start, skeleton = len(tokens), list[int]()
            self._append_template(tokens, segment.text, hidden)
            self._append_template(skeleton, segment.skeleton, hidden)
            if self._tokenizer.reserved(tokens[start:]) == self._tokenizer.reserved(skeleton):
                return
            del tokens[start:]
        for text, content in zip_longest(texts, inner, fillvalue=""):
            self._append_template(tokens, text, hidden)
            self._tokenizer.append_content(tokens, content)

    def _append_template(self, tokens: list[int], text: str, hidden: list[str]) -> None:
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


def _changed_answers(whole: str, texts: list[str], answers: _Answers) -> list[int]:
    """
    Return the answers that do not stand unchanged between these texts in the whole. After a changed
    one the comparison continues where the next text is found.
    """
    if not whole.startswith(texts[0]):
        return list(answers)
    changed = []
    position = len(texts[0])
    for (i, answer), text in zip(answers.items(), texts[1:], strict=True):
        if whole.startswith(answer.text + text, position):
            position += len(answer.text + text)
        else:
            changed.append(i)
            position = max(position, whole.find(text, position)) + len(text)
    return changed if changed or position == len(whole) else list(answers)
