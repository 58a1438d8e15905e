import time

import pytest

from services.inference.engine.output.stops import StopBuffer, StopRules
from services.inference.settings import STOPS


def push_all(stops: StopRules, pieces: list[str]) -> tuple[str, str | None]:
    buffer, sent = StopBuffer(stops), ""
    for piece in pieces:
        text, stop = buffer.push(piece)
        sent += text
        if stop is not None:
            return sent, stop
    return sent + buffer.flush(), None


def apply_stop(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """Apply the `stop` of a request; return the text and whether it was stopped."""
    sent, stop = push_all(StopRules.literal(stops), pieces)
    return sent, stop is not None


def test_text_without_a_stop_string_is_unchanged() -> None:
    assert apply_stop(("User:",), ["Hello", " wor", "ld"]) == ("Hello world", False)


def test_no_part_of_a_stop_string_leaks() -> None:
    text = "fine\nUser: me"
    for cut in range(len(text) + 1):
        assert apply_stop(("\nUser:", "User:"), [text[:cut], text[cut:]]) == ("fine", True)
    assert apply_stop(("\nUser:",), list(text)) == ("fine", True)


def test_unfinished_stop_string_is_text() -> None:
    assert apply_stop(("User:",), ["Use", "ful"]) == ("Useful", False)
    assert apply_stop(("User:",), ["the Use"]) == ("the Use", False)


@pytest.mark.parametrize("stops", [("aab",), ("aab", "ab")])
def test_overlapping_prefixes_are_found(stops: tuple[str, ...]) -> None:
    sent, stopped = apply_stop(stops, list("xaaab"))
    assert stopped and sent in ("xa", "xaa")


def test_first_stop_string_in_the_text_wins() -> None:
    assert apply_stop(("two", "one"), ["one two"]) == ("", True)


def test_only_a_possible_prefix_is_held_back() -> None:
    buffer = StopBuffer(StopRules.literal(("\n\n\n", "User:")))
    assert buffer.push("Hello\n").text == "Hello"
    assert buffer.push("\n").text == ""
    assert buffer.push("W").text == "\n\nW"


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopBuffer(StopRules.literal(())).push("User:").text == "User:"


def apply_chat_stop(
    text: str, prompt: str = "hi", stops: tuple[str, ...] = STOPS
) -> tuple[str, str | None]:
    """Apply CHAT_STOP, with the same result for any split of the text."""
    rules = StopRules.from_setting(stops, prompt)
    whole = push_all(rules, [text])
    assert push_all(rules, list(text)) == whole
    for size in (2, 3, 7):
        assert push_all(rules, [text[at : at + size] for at in range(0, len(text), size)]) == whole
    return whole


@pytest.mark.parametrize(
    ("text", "sent", "stop"),
    [
        ("It is Paris.\nUser: and Spain?", "It is Paris.", "\nUser:"),
        ("It is Paris.\n\nUser: and Spain?", "It is Paris.", "User:"),
        ("It is Paris.\nHuman: and Spain?", "It is Paris.", "\nHuman:"),
        ("It is Paris.\nQuestion: and Spain?", "It is Paris.", "\nQuestion:"),
        ("It is Paris.\n\nExample: Madrid", "It is Paris.", "Example:"),
        ("It is Paris.</s>It is", "It is Paris.", "</s>"),
        ("It is Paris.\n\n\nIt is", "It is Paris.", "\n\n\n"),
        ("It is Paris.\n\nLet me ask you.\n\nUser: hi", "It is Paris.", "User:"),
        ("It is Paris.\n\nHere's an example:\nHuman: hi", "It is Paris.", "\nHuman:"),
        ("```c\nint x;\n```\nUser: thanks", "```c\nint x;\n```", "\nUser:"),
        ("Use `ls`.\nUser: thanks", "Use `ls`.", "\nUser:"),
        ("🙂\nUser: hi", "🙂", "\nUser:"),
    ],
)
def test_text_appended_to_an_answer_is_removed(text: str, sent: str, stop: str) -> None:
    assert apply_chat_stop(text) == (sent, stop)


@pytest.mark.parametrize(
    "text",
    [
        "Here's an example of a for loop in C:\n\n```c\nfor (;;) {}\n```",
        "Example: 2 + 2 is 4.",
        "Question: what is it?\nAnswer: a cat.\n\nQuestion: and this?\nAnswer: a dog.",
        "\n\nUser: is a role.",
        "\n\n\nParis.",
        "It is simple.\n\nHere's an example in Python:\n\n```python\nx = 1\n```\n\nThat is all.",
        "Dear Ada,\n\nLet me know what you think.\n\nBest regards",
        "It is Paris.\n\nLet me know if you have other questions.",
        "It is Paris.\n\nLet m",
        "Say Example: and Question: and User: as often as you like.",
        "The line\nExample: is one of many.",
        "```yaml\n\nUser: root\n\n\nHuman: yes\n\nExample: 1\n</s>\n```\nDone.",
        "1. Write:\n   ```\n\nUser: root\n   ```\nDone.",
        "~~~~\n~~~\nUser: root\n~~~~\nDone.",
        "- ```py\n  x = 1\n\n\n  y = 2\n  ```",
        "Strike it through by `<s>text</s>` or so.",
        "Here is a quiz:\n\nQuestion: what is it?\n\nQuestion: and this?",
        "## FAQ\n\nQuestion: what is it?\n\nQuestion: and this?",
        "**Chat**\n\nUser: hi\n\nAgent: hello\n\nUser: bye",
        "Here is a quiz:\n\n---\nQuestion: what is it?",
    ],
)
def test_ordinary_answer_is_unchanged(text: str) -> None:
    assert apply_chat_stop(text) == (text, None)


def test_label_in_the_prompt_does_not_end_the_answer() -> None:
    text = "It calls itself.\n\nExample: the factorial.\n\nExample: a tree."
    for prompt in ("Explain recursion with an example.", "EXAMPLES of recursion", "an Example: x"):
        assert apply_chat_stop(text, prompt) == (text, None)
    for prompt in ("Explain recursion.", "exemplary", "counterexample"):
        assert apply_chat_stop(text, prompt) == ("It calls itself.", "Example:")


def test_label_in_the_prompt_leaves_other_strings_active() -> None:
    sent = apply_chat_stop("Hi.\nHuman: so</s>", "Write a dialogue with a user </s>")
    assert sent == ("Hi.", "\nHuman:")


@pytest.mark.parametrize(
    ("string", "text", "sent"),
    [
        ("Summary:", "It is so.\n\nSummary: so", "It is so."),
        ("Summary:", "It is so.\nSummary: so", None),
        ("\nSummary:", "It is so.\nSummary: so", "It is so."),
        ("\nDone", "It is so.\nDone", "It is so."),
        ("用户：", "好。\n\n用户：你好", "好。"),
        ("用户：", "例如：\n\n用户：你好", None),
        ("###", "It is so. ### Next", "It is so. "),
        ("[INST]", "It is so. [INST]", "It is so. "),
    ],
)
def test_custom_stop_string_is_classified_by_its_shape(
    string: str, text: str, sent: str | None
) -> None:
    assert apply_chat_stop(text, stops=(string,)) == ((sent, string) if sent else (text, None))


def test_opener_is_held_back_for_one_line_only() -> None:
    buffer = StopBuffer(StopRules.from_setting(STOPS, "hi"))
    assert buffer.push("So.\n\nLet me show it:\n").text == "So."
    assert buffer.push("\nUs").text == ""
    assert buffer.push("e it").text == "\n\nLet me show it:\n\nUse it"


def test_interrupted_answer_loses_only_half_a_stop_string() -> None:
    buffer = StopBuffer(StopRules.from_setting(STOPS, "hi"))
    assert buffer.push("So.\n\nLet me show it:\n").text == "So."
    assert buffer.flush_interrupted() == "\n\nLet me show it:"


@pytest.mark.parametrize("sign", [" ", ">", "`", "- ", ": ", "* ", "~"])
def test_long_line_of_punctuation_takes_linear_time(sign: str) -> None:
    buffer = StopBuffer(StopRules.from_setting(("\nUser:", "Let me", "\n\n\n"), "hi"))
    began = time.process_time()
    for text in ("a\n", sign * 20_000, "x\n", "b\nUser:"):
        buffer.push(text)
    assert time.process_time() - began < 1
