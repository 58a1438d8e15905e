import pytest

from services.inference.engine.stops import StopBuffer


def say(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    buffer, said = StopBuffer(stops), ""
    for piece in pieces:
        text, stopped = buffer.push(piece)
        said += text
        if stopped:
            return said, True
    return said + buffer.flush(), False


def test_text_without_a_stop_string_comes_out_whole() -> None:
    assert say(("User:",), ["Hello", " wor", "ld"]) == ("Hello world", False)


def test_nothing_of_a_stop_string_leaks_however_it_is_cut() -> None:
    text = "fine\nUser: me"
    for cut in range(len(text) + 1):
        assert say(("\nUser:", "User:"), [text[:cut], text[cut:]]) == ("fine", True)
    assert say(("\nUser:",), list(text)) == ("fine", True)


def test_the_beginning_of_a_stop_string_that_comes_to_nothing_is_text() -> None:
    assert say(("User:",), ["Use", "ful"]) == ("Useful", False)
    assert say(("User:",), ["the Use"]) == ("the Use", False)


@pytest.mark.parametrize("stops", [("aab",), ("aab", "ab")])
def test_overlapping_beginnings_are_found(stops: tuple[str, ...]) -> None:
    said, stopped = say(stops, list("xaaab"))
    assert stopped and said in ("xa", "xaa")


def test_the_stop_string_that_comes_first_wins() -> None:
    assert say(("two", "one"), ["one two"]) == ("", True)


def test_no_character_waits_that_no_stop_string_could_begin_with() -> None:
    buffer = StopBuffer(("\n\n\n", "User:"))
    assert buffer.push("Hello\n").out == "Hello"
    assert buffer.push("\n").out == ""
    assert buffer.push("W").out == "\n\nW"


def test_without_stop_strings_nothing_waits() -> None:
    assert StopBuffer(()).push("User:").out == "User:"
