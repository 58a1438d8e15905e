from bench.stops import PROMPTS, format_report


def test_report_names_cut_answers_and_their_stop_strings() -> None:
    answers = {
        "What is it?": "It is so.\n\nLet me know.",
        "And this?": "It is this.\n\nExample: x",
    }
    table = format_report("m", answers)
    assert "Whole: 1 of 2 by the rules, 0 literally." in table
    assert '| What is it? | 23 | whole | 11, `"Let me"` |' in table
    assert '| And this? | 23 | 11, `"Example:"` | 13, `"Example:"` |' in table


def test_prompts_are_unique() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 50
