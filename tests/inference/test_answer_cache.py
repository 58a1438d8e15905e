"""The prompt builder's cache of answers' tokens."""

from services.inference.prompt_builder import ENTRY_TOKENS, AnswerCache
from services.inference.state_folder import KeptAnswer


def cached(answers: AnswerCache, *names: str, tenant: str = "t") -> dict[str, list[int]]:
    return {name: list(tokens) for name, tokens in answers.get(tenant, names).items()}


def test_get_returns_the_tokens_of_cached_answers() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "1", [5, 6])
    answers.add("t", "2", [7])
    assert cached(answers, "1", "2", "3") == {"1": [5, 6], "2": [7]}


def test_first_exchange_is_kept_by_tenant_and_name() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "5", [5], first_exchange="2")
    assert answers.first_exchange("t", "5") == "2"
    assert answers.first_exchange("u", "5") == ""
    assert answers.first_exchange("t", "4") == ""


def test_forget_session_drops_its_answers_only() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "1", [5], session_key="t.a")
    answers.add("t", "2", [6], session_key="t.b")
    answers.add("t", "3", [7])
    answers.forget_session("t.a")
    assert cached(answers, "1", "2", "3") == {"2": [6], "3": [7]}


def test_set_first_exchange_changes_cached_answers_only() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "5", [5], first_exchange="2")
    answers.set_first_exchange("t", "5", "4")
    answers.set_first_exchange("t", "6", "4")
    assert answers.first_exchange("t", "5") == "4"
    assert cached(answers, "5", "6") == {"5": [5]}


def test_tenants_with_equal_request_ids_are_separate() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "1", [5])
    assert cached(answers, "1", tenant="u") == {}


def test_answer_with_a_repeated_name_replaces_the_first() -> None:
    answers = AnswerCache(ENTRY_TOKENS + 2)
    for _ in range(3):
        answers.add("t", "1", [5, 6])
    assert cached(answers, "1") == {"1": [5, 6]}


def test_least_recently_used_answers_are_evicted() -> None:
    answers = AnswerCache(3 * ENTRY_TOKENS + 30)
    for name in "123":
        answers.add("t", name, range(10))
    cached(answers, "1")
    answers.add("t", "4", range(11))
    assert cached(answers, *"1234").keys() == {"1", "4"}


def test_answer_longer_than_the_cache_is_not_kept() -> None:
    answers = AnswerCache(10)
    answers.add("t", "1", range(100))
    assert cached(answers, "1") == {}


def test_empty_answers_count_too() -> None:
    answers = AnswerCache(10 * ENTRY_TOKENS)
    for name in range(100):
        answers.add("t", str(name), [])
    assert len(cached(answers, *map(str, range(100)))) == 10


def test_entries_are_all_answers_least_recently_used_first() -> None:
    answers = AnswerCache(1000)
    answers.add("t", "1", [1], "0", "t.a")
    answers.add("u", "2", [2])
    answers.get("t", ["1"])
    assert answers.entries() == [
        KeptAnswer("u", "2", b"\2\0\0\0", "", ""),
        KeptAnswer("t", "1", b"\1\0\0\0", "0", "t.a"),
    ]
