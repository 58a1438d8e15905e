from services.inference.engine.output.detokenizer import Detokenizer


def test_a_character_that_is_spread_over_tokens_comes_out_whole() -> None:
    detokenizer = Detokenizer()
    data = "é🙂中".encode()
    said = [detokenizer.push(data[i : i + 1]) for i in range(len(data))]
    assert [s for s in said if s] == ["é", "🙂", "中"]


def test_bytes_that_are_no_character_become_a_replacement_and_harm_nothing_after() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"\xff") + detokenizer.push(b"ok") == "�ok"


def test_half_a_character_at_the_end_is_not_said() -> None:
    assert Detokenizer().push("🙂".encode()[:2]) == ""
