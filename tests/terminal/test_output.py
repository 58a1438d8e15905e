"""What is shown of an answer, on a terminal and in a pipe."""

import io

import pytest
from msgspec.structs import replace

from services.contract.messages import Done, Failed, FinishReason, Progress, Timings, Usage
from services.terminal.output import AnswerView, Notes, cut_note, end_notes
from tests.fakes import Hold, Script, answer_script

PARTS = (
    ("reasoning", "Hm"),
    ("content", "Well"),
    ("call", "go"),
    ("arguments", '{"to":'),
    ("arguments", "1}"),
    ("call", "stop"),
)
DONE = Done("stop", Usage(7, 150, 0), Timings(0, 0, 0), 0, "log", 9)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no terminal")


def show(script: Script, stdout: io.StringIO, stderr: io.StringIO) -> tuple[str, str]:
    view = AnswerView(stdout, Notes(stderr))
    for event in script:
        assert not isinstance(event, float | Hold)
        view.show(event)
    return stdout.getvalue(), stderr.getvalue()


def test_pipe_gets_content_and_calls_alone() -> None:
    script = answer_script(*PARTS, finish_reason="tool_calls")
    assert show(script, io.StringIO(), io.StringIO()) == ('Well\n[go {"to":1}]\n[stop ]\n', "")


def test_reasoning_is_dimmed_and_on_stderr_of_a_terminal() -> None:
    _, notes = show(answer_script(*PARTS), io.StringIO(), Tty())
    assert notes == "\x1b[2mHm\x1b[22m\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
async def test_terminal_without_styles_shows_plain_text(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    script = (*answer_script(("reasoning", "Hm"), ("content", "**Well**")), Failed("internal", "x"))
    assert show(script, Tty(), Tty()) == ("**Well**\n", "Hm\n[x]\n")


async def test_terminal_shows_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, _ = show(answer_script(("content", "**Well**")), Tty(), Tty())
    assert "\x1b[1mWell" in shown and "*" not in shown


def test_answer_cut_in_a_call_ends_with_the_reason() -> None:
    script = answer_script(("call", "go"), ("arguments", "{"), finish_reason="timeout")
    answer, notes = show(script, io.StringIO(), io.StringIO())
    assert answer == "[go {]\n"
    assert notes == "[stopped because its time was up (timeout_s)]\n"


def test_error_message_is_cleaned_and_on_stderr() -> None:
    failed = Failed("model_not_found", "No model '\x1b]0;t\x07'.")
    assert show((failed,), io.StringIO(), io.StringIO()) == ("", "[No model '␛]0;t␇'.]\n")


def test_error_of_a_full_queue_tells_the_wait() -> None:
    failed = Failed("overloaded", "Full: try again.", 6.2)
    assert (
        show((failed,), io.StringIO(), io.StringIO())[1]
        == "[Full: try again. Expected wait: 7 s.]\n"
    )


def test_progress_is_not_shown_in_a_pipe() -> None:
    assert show((Progress(2, 0, 0),), io.StringIO(), io.StringIO()) == ("", "")


@pytest.mark.parametrize(
    ("reason", "stop_string", "note"),
    [
        ("stop", None, None),
        ("stop", "\nQuestion:", 'stopped at "\\nQuestion:" (CHAT_STOP)'),
        ("stop", "用户：", 'stopped at "用户：" (CHAT_STOP)'),
        ("length", None, "cut off after 150 tokens (CHAT_MAX_TOKENS or MODEL_CONTEXT)"),
        ("loop", None, "stopped because it repeated itself (CHAT_REPEAT_PENALTY)"),
        ("timeout", None, "stopped because its time was up (timeout_s)"),
        ("cancelled", None, "stopped"),
    ],
)
def test_cut_note_names_the_reason_and_the_setting(
    reason: FinishReason, stop_string: str | None, note: str | None
) -> None:
    assert cut_note(replace(DONE, finish_reason=reason, stop_string=stop_string)) == note


def test_empty_and_unstored_answers_are_noted() -> None:
    empty = replace(DONE, length=0, stored="failed")
    assert list(end_notes(empty)) == [
        "the answer is empty: the model ended it at once",
        "not stored: the session continues without this answer",
    ]
