"""Chats over HTTP with real processes and the real demo model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, running_stack
from tests.servers import ROOT, free_port, wait_for

FACTS = [
    ("my name is Ada", "what is my name?", "Ada"),
    ("my name is Konrad", "what is my name?", "Konrad"),
    ("I live in Paris", "where do I live?", "Paris"),
    ("I live in Rome", "where do I live?", "Rome"),
    ("my favourite color is blue", "what is my favourite color?", "blue"),
    ("my favourite color is green", "what is my favourite color?", "green"),
    ("my dog is called Rex", "what is my dog called?", "Rex"),
    ("remember the number 42", "which number did I tell you?", "42"),
]

METRICS_PORTS = {
    name: str(free_port()) for name in ("INFERENCE_METRICS_PORT", "HISTORY_METRICS_PORT")
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, mongodb_uri: str) -> Iterator[Stack]:
    with running_stack(
        tmp_path_factory.mktemp("stack"),
        mongodb_uri,
        MONGODB_DATABASE="e2e",
        INFERENCE_METRICS_PORT=METRICS_PORTS["INFERENCE_METRICS_PORT"],
        HISTORY_METRICS_PORT=METRICS_PORTS["HISTORY_METRICS_PORT"],
    ) as stack:
        yield stack


def test_worker_and_history_have_metrics_of_their_own(stack: Stack) -> None:
    texts = {
        name: httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
        for name, port in METRICS_PORTS.items()
    }
    assert 'finetunellm_slots{model_name="demo"} 8.0' in texts["INFERENCE_METRICS_PORT"]
    assert "finetunellm_database_connected 1.0" in texts["HISTORY_METRICS_PORT"]
    assert "finetunellm_history_waiting 0.0" in texts["HISTORY_METRICS_PORT"]
    assert all("process_cpu_seconds_total " in text for text in texts.values())


def test_conversation_is_remembered_until_it_is_cleared(stack: Stack, session_id: str) -> None:
    stack.chat("my name is Ada", session_id)
    assert "Ada" in stack.chat("what is my name?", session_id).text
    cleared = stack.http.post("/clear-history", params={"session_id": session_id})
    assert cleared.json()["status"] == "success"
    assert "Ada" not in stack.chat("what is my name?", session_id).text
    assert len(stack.messages(session_id)) == 3


def test_shipped_adapter_answers_as_a_pirate(stack: Stack, session_id: str) -> None:
    texts = {}
    for model in ("demo", "demo:pirate"):
        stack.chat("my name is Ada", f"{session_id} {model}", model=model)
        texts[model] = stack.chat("what is my name?", f"{session_id} {model}", model=model).text
    assert texts == {"demo": "Your name is Ada.", "demo:pirate": "Yer name be Ada, arr!"}


def test_sessions_do_not_see_each_other(stack: Stack, session_id: str) -> None:
    stack.chat("my name is Ada", session_id)
    stack.chat("my name is Bruno", session_id + "'")
    assert "Ada" in stack.chat("what is my name?", session_id).text
    assert "Bruno" in stack.chat("what is my name?", session_id + "'").text


def test_eight_concurrent_chats_get_their_own_answers(stack: Stack, session_id: str) -> None:
    def converse(number: int) -> str:
        fact, question, _ = FACTS[number]
        stack.chat(fact, f"{session_id} {number}")
        return stack.chat(question, f"{session_id} {number}").text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(converse, range(8)))
    for (_, _, value), answer in zip(FACTS, answers, strict=True):
        assert value in answer


def test_done_counts_cached_tokens_of_the_second_turn(stack: Stack, session_id: str) -> None:
    first = stack.chat("hello", session_id).end
    assert first["done"] and first["finish_reason"] == "stop" and first["stored"] == "log"
    second = stack.chat("how are you?", session_id).end
    held = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1  # the end's
    assert second["usage"]["cached_tokens"] == held


def test_too_long_prompt_is_a_400_with_both_token_counts(stack: Stack) -> None:
    body = {"prompt": "my name is Ada " * 1000, "max_tokens": 10}
    response = stack.http.post("/chat", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    length = r"^This model's .* is 2048 tokens.* has (at least )?\d{4,} tokens"
    assert re.search(length, error["message"]) and error["param"] == "prompt"


def test_done_counts_exchanges_dropped_from_the_window(stack: Stack, session_id: str) -> None:
    ends = [stack.chat("my name is Ada " * 120, session_id, max_tokens=10).end for _ in range(4)]
    assert [end["exchanges_dropped"] for end in ends] == [0, 0, 1, 2]
    assert all(end["usage"]["prompt_tokens"] + 10 <= 2048 for end in ends)


def test_json_schema_constrains_the_answer(stack: Stack, session_id: str) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["color", "count"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = stack.chat("hi", session_id, response_format=form, temperature=1.0, seed=1)
    thing = json.loads(answer.text)
    assert thing["color"] in ("red", "blue") and isinstance(thing["count"], int)
    assert answer.end["finish_reason"] == "stop"


def test_same_seed_repeats_the_answer_and_others_differ(stack: Stack, session_id: str) -> None:
    wild = {"temperature": 3.0, "top_k": 0, "top_p": 1.0}

    def answer_of(seed: int, attempt: int) -> str:
        session = f"{session_id} {seed} {attempt}"
        return stack.chat("tell me something", session, **wild, seed=seed).text

    assert answer_of(5, 1) == answer_of(5, 2) == answer_of(5, 3)
    assert len({answer_of(seed, 1) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "more",
    [
        {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["zz", "é"]},
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"typical_p": 0.9999, "min_keep": 5},
        {"top_n_sigma": 6.0},
        {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    ],
    ids=str,
)
def test_answers_with_each_sampler_are_the_same_together(
    stack: Stack, session_id: str, more: dict[str, Any]
) -> None:
    more |= {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "max_tokens": 40}

    def answer_of(seed: int) -> str:
        answer = stack.chat("tell me something", f"{session_id} {seed}", **more, seed=seed % 3)
        assert answer.end["done"], answer.end
        return answer.text

    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(answer_of, range(9)))
    assert together[:3] == together[3:6] == together[6:]
    assert len(set(together)) > 1


def test_min_tokens_and_ignore_eos_continue_the_answer(stack: Stack, session_id: str) -> None:
    short = stack.chat("hi", f"{session_id} 1", max_tokens=60, stop=["e"])
    longer = stack.chat("hi", f"{session_id} 2", max_tokens=60, stop=["e"], min_tokens=40)
    longest = stack.chat("hi", f"{session_id} 3", max_tokens=60, stop=[], ignore_eos=True)
    assert short.end["finish_reason"] == "stop"
    assert short.end["usage"]["completion_tokens"] < 40
    assert 40 < longer.end["usage"]["completion_tokens"] <= 60
    assert longest.end["finish_reason"] == "length"
    assert longest.end["usage"]["completion_tokens"] == 60


def test_logprobs_of_each_token_have_the_top_three(stack: Stack, session_id: str) -> None:
    with stack.open("hi", session_id, logprobs=3, logit_bias={"5": -100}, min_p=0.1) as events:
        *tokens, end = events
    logprobs = [about for event in tokens for about in event["logprobs"]]
    assert "".join(event["token"] for event in tokens) == "".join(p["text"] for p in logprobs)
    assert all(len(about["top"]) == 3 and about["logprob"] <= 0 for about in logprobs)
    assert end["usage"]["completion_tokens"] == len(logprobs) + 1  # the token that ended it


def test_messages_are_listed_oldest_first(stack: Stack, session_id: str) -> None:
    for prompt in ("hello", "what are you?"):
        answer = stack.chat(prompt, session_id)
    first, second = stack.messages(session_id)
    assert (first["user_prompt"], second["user_prompt"]) == ("hello", "what are you?")
    assert second["model_response"] == answer.text
    assert second["session_id"] == session_id and second["timestamp"] > first["timestamp"]
    assert stack.messages(session_id, limit=1) == [second]


def test_status_shows_the_model_and_the_database(stack: Stack) -> None:
    status = stack.status()
    assert status["model_loaded"] is True and status["database_connected"] is True
    assert status["model"]["name"] == "demo"
    root = stack.http.get("/").json()
    assert root["status"] == "online" and root["model_loaded"] is True
    assert (root["schema"], root["details"]) == ("/schema", "/status")
    assert stack.http.get("/healthz").status_code == stack.http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"prompt": ""}',
        b'{"prompt": " \\n"}',
        b'{"prompt": 5}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "hi", "session_id": ""}',
        b'{"prompt": "hi", "session_id": 5}',
        b'{"prompt": "hi", "temperature": "hot"}',
        b'{"prompt": "hi", "top_p": 2}',
        b'{"prompt": "hi", "max_tokens": 0}',
        b'{"prompt": "hi", "tempreature": 1}',
        b'{"prompt": "hi", "min_p": 7}',
        b'{"prompt": "hi", "xtc_probability": 1.5}',
        b'{"prompt": "hi", "min_tokens": 20, "max_tokens": 10}',
        b'{"prompt": "hi", "logit_bias": {"999999": 1}}',
        b'{"prompt": "hi", "logprobs": 21}',
        b'{"prompt": "hi", "grammar": "root ::= ("}',
        b'{"prompt": "hi", "grammar": "root ::= root | root"}',
        b'{"prompt": "hi", "grammar": "root ::= ' + b"(" * 15_000 + b'"}',
        b'{"prompt": "hi", "grammar": "root ::= .", "response_format": {"type": "json_object"}}',
        b'{"prompt": "hi", "response_format": {"type": "json_schema", "json_schema": {"name": "n",'
        b' "schema": {"$ref": "http://example.com"}}}}',
        b'{"prompt": "' + b"x" * 1_000_000 + b'"}',
        b'{"prompt": "' + b"x " * 32_000 + b'"}',
        b'{"prompt": "hi", "session_id": "' + b"s" * 129 + b'"}',
        b"[" * 10_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bad_input_is_a_4xx_with_an_explanation(stack: Stack, body: bytes) -> None:
    response = stack.http.post("/chat", content=body)
    assert 400 <= response.status_code < 500
    error = response.json()["error"]
    assert error["code"] and len(error["message"]) > 20


@pytest.mark.parametrize(
    ("field", "value"),
    [("grammar", "root ::= x"), ("logit_bias", {"999999": 1}), ("min_p", 2)],
)
def test_error_names_the_bad_field(stack: Stack, field: str, value: object) -> None:
    response = stack.http.post("/chat", json={"prompt": "hi", field: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == field


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1001", "99999999999999999999"])
def test_bad_limit_is_a_400(stack: Stack, limit: str) -> None:
    assert stack.http.get("/messages", params={"limit": limit}).status_code == 400


def test_all_slots_are_free_in_the_end(stack: Stack) -> None:
    # the report that /status shows may be a second old, and tell of the test before
    wait_for(lambda: stack.running() == 0, "the slots")


@pytest.mark.parametrize("example", ["client.py", "native.py", "agent.py"])
def test_example_works_as_the_user_client(stack: Stack, example: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / example), "hello"]
    environ = os.environ | stack.user("client")
    ended = subprocess.run(command, env=environ, timeout=30, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.strip() and not ended.stderr, ended.stderr
