import pytest

from services.client.__main__ import cut_note
from services.contract.messages import Done, FinishReason, Timings, Usage


@pytest.mark.parametrize(
    ("reason", "stop_string", "note"),
    [
        ("stop", None, None),
        ("stop", "\nQuestion:", 'stopped at "\\nQuestion:" (CHAT_STOP)'),
        ("stop", "用户：", 'stopped at "用户：" (CHAT_STOP)'),
        ("length", None, "cut off after 150 tokens (CHAT_MAX_TOKENS)"),
        ("loop", None, "stopped because it repeated itself (CHAT_REPEAT_PENALTY)"),
        ("timeout", None, "stopped because its time was up (timeout_s)"),
        ("cancelled", None, "cancelled"),
    ],
)
def test_terminal_names_what_cut_an_answer_and_the_setting(
    reason: FinishReason, stop_string: str | None, note: str | None
) -> None:
    done = Done(reason, Usage(7, 150, 0), Timings(0, 0, 0), 0, "log", 9, stop_string)
    assert cut_note(done) == note
