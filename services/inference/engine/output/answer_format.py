"""
How a model writes its answers: the markers of reasoning, content and tool calls.

All calls are described alike, as literals around holes:

    section_open (call_open NAME name_end ARGUMENTS call_close) separator (…) section_close

White space in literals is optional in answers. `ID` in a literal is the hole of a call's id, `KEY`
that of an argument's name, where it is repeated.
"""

from collections.abc import Callable
from os.path import commonprefix
from typing import Literal, NamedTuple

ID, KEY, NAME = "\ue010", "\ue011", "\ue012"  # private use characters, which no template writes

ValueSyntax = Literal["raw", "cdata", "xml", "python", "gemma"]


class ArgumentFormat(NamedTuple):
    """
    One argument: `open KEY mid VALUE close`. Templates may write another `mid` for each JSON type:
    `mids` are pairs of a type and its text. In `raw` syntax strings are unquoted, and all other
    values are JSON; in `cdata`, strings may be in `<![CDATA[…]]>`; in `xml`, objects and lists are
    nested elements.
    """

    open: str
    mids: tuple[tuple[str, str], ...]
    close: str
    separator: str
    syntax: ValueSyntax

    @property
    def mid(self) -> str:
        """The text before a string."""
        return self.mids[0][1]

    def mid_of(self, types: set[str] | None) -> str:
        """Return the text before a value that has one of the types."""
        if not types or "string" in types:
            return self.mid
        known = {"integer": "number"}
        return dict(self.mids).get(known.get(min(types), min(types)), self.mid)

    @property
    def literals(self) -> tuple[str, ...]:
        return (self.open, *(text for _, text in self.mids), self.close, self.separator)


class ObjectFormat(NamedTuple):
    """
    A call as a JSON object. `name_key` is "" if the name is the key: `{"name": {…arguments…}}`.
    The texts around the name and the arguments are as the template writes them.
    """

    name_key: str
    arguments_key: str
    begin: str  # from the brace to the name, with its quotation mark
    middle: str  # between the name and the arguments
    end: str  # after the arguments


class CallFormat(NamedTuple):
    """
    With `object`, a call is a JSON object, and NAME and `name_end` are in it. Else the arguments
    are a JSON object, or written one by one as `argument` says.
    """

    section_open: str = ""
    call_open: str = ""
    name_end: str = ""
    call_close: str = ""
    separator: str = ""
    section_close: str = ""
    object: ObjectFormat | None = None
    argument: ArgumentFormat | None = None
    can_repeat: bool = True  # whether an answer may have several calls

    @property
    def literals(self) -> tuple[str, ...]:
        return tuple(field for field in self if isinstance(field, str)) + tuple(
            self.argument.literals if self.argument else ()
        )


class ReasoningFormat(NamedTuple):
    """
    `between` is the template's text between `end` and the content, `before` the one after `start`.
    """

    start: str
    end: str
    before: str = ""
    between: str = ""


class HeaderFormat(NamedTuple):
    """
    Messages with headers, as in OpenAI's harmony (https://cookbook.openai.com/articles/openai-harmony):
    `start HEADER body TEXT end`. An answer begins inside a header. `call` is a regex that finds the
    name of a called tool in a header, `thought` one of a header before reasoning, and `prefix` one
    of what may begin a header; "" for none.
    """

    start: str
    body: str
    ends: tuple[str, ...]
    call: str
    thought: str
    prefix: str
    content: str  # the header of content, as the template writes it
    call_header: str  # that of a call, with `NAME`


class AnswerFormat(NamedTuple):
    """`content_start`, `content_end` and `turn` are markers without a meaning for the reader."""

    reasoning: ReasoningFormat | None = None
    calls: CallFormat | None = None
    content_start: str = ""
    content_end: str = ""
    turn: str = ""  # a begin of an assistant's message that is repeated inside an answer
    header: HeaderFormat | None = None

    @property
    def next_turn(self) -> str:
        """What begins the next message of an answer, after its reasoning."""
        return self.turn or (self.header.start if self.header else "")

    @property
    def thought(self) -> ReasoningFormat | None:
        """
        How thoughts are written: if the template does not show it, as most fine-tuned models do,
        in `<think>` at the begin of an answer.
        """
        return self.reasoning or (None if self.header else THINK)

    def thought_opening(self, tokenize: Callable[[str, bool], list[int]]) -> tuple[int, ...]:
        """
        Return the first tokens of a thought, up to the one that tells it from content and calls;
        () if there is none. `tokenize` takes a text, and whether names of special tokens are such.
        """
        if self.thought is None or not self.thought.start.strip():
            return ()
        calls = [each for each in (self.calls, HERMES) if each]
        texts = [each for call in calls for each in (call.section_open, call.call_open)]
        if self.header:
            texts += [self.header.content, self.header.call_header.partition(NAME)[0]]
        thought = tokenize(self.thought.start.strip(), True)
        others = [tokenize(text.strip(), True) for text in (*texts, self.content_start)]
        shared = max(len(commonprefix([thought, other])) for other in others)
        return tuple(thought[: shared + 1]) if shared < len(thought) else ()

    @property
    def is_plain(self) -> bool:
        """Return whether all text of an answer is content."""
        return self == AnswerFormat() and self.thought is None

    @property
    def literals(self) -> tuple[str, ...]:
        """Return all texts in which markers can occur."""
        return (
            *(self.thought or ()),
            *(self.calls.literals if self.calls else ()),
            self.content_start,
            self.content_end,
            self.turn,
            *((self.header.start, self.header.body, *self.header.ends) if self.header else ()),
        )


THINK = ReasoningFormat("<think>", "</think>", between="\n\n")
HERMES = CallFormat(
    call_open="<tool_call>\n",
    call_close="\n</tool_call>",
    separator="\n",
    object=ObjectFormat("name", "arguments", '{"name": "', '", "arguments": ', "}"),
)
