from services.contract.messages import Turn
from services.inference.answers import OVERHEAD, AnswerTokens


def turns(*request_ids: str) -> list[Turn]:
    return [Turn(request_id, "question", "answer") for request_id in request_ids]


def known(answers: AnswerTokens, *request_ids: str, tenant: str = "t") -> dict[str, list[int]]:
    return {id: list(tokens) for id, tokens in answers.of(tenant, turns(*request_ids)).items()}


def test_the_tokens_of_the_answers_in_a_context_are_known_by_request_id() -> None:
    answers = AnswerTokens()
    answers.remember("t", "1", [5, 6])
    answers.remember("t", "2", [7])
    assert known(answers, "1", "2", "3") == {"1": [5, 6], "2": [7]}


def test_it_is_known_where_the_last_answers_prompt_began() -> None:
    answers = AnswerTokens()
    answers.remember("t", "5", [5], since="2")
    assert answers.since("t", turns("4", "5")) == "2"
    assert answers.since("u", turns("4", "5")) == ""
    assert answers.since("t", turns("5", "4")) == ""
    assert answers.since("t", ()) == ""


def test_the_next_prompt_may_begin_elsewhere() -> None:
    answers = AnswerTokens()
    answers.remember("t", "5", [5], since="2")
    answers.begin("t", "5", "4")
    answers.begin("t", "6", "4")
    assert answers.since("t", turns("4", "5")) == "4"
    assert known(answers, "5", "6") == {"5": [5]}


def test_tenants_whose_request_ids_are_alike_are_kept_apart() -> None:
    answers = AnswerTokens()
    answers.remember("t", "1", [5])
    assert known(answers, "1", tenant="u") == {}


def test_a_request_id_that_comes_again_means_its_last_answer() -> None:
    answers = AnswerTokens(most_tokens=OVERHEAD + 2)
    for _ in range(3):
        answers.remember("t", "1", [5, 6])
    assert known(answers, "1") == {"1": [5, 6]}


def test_what_was_not_used_for_longest_is_forgotten_once_there_are_too_many_tokens() -> None:
    answers = AnswerTokens(most_tokens=3 * OVERHEAD + 30)
    for request_id in "123":
        answers.remember("t", request_id, range(10))
    known(answers, "1")
    answers.remember("t", "4", range(11))
    assert known(answers, *"1234").keys() == {"1", "4"}


def test_an_answer_longer_than_all_that_can_be_held_is_not_kept() -> None:
    answers = AnswerTokens(most_tokens=10)
    answers.remember("t", "1", range(100))
    assert known(answers, "1") == {}


def test_empty_answers_do_not_pile_up() -> None:
    answers = AnswerTokens(most_tokens=10 * OVERHEAD)
    for i in range(100):
        answers.remember("t", str(i), [])
    assert len(known(answers, *map(str, range(100)))) == 10
