from datetime import UTC, datetime

import httpx
import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Feedback, FeedbackRequest, FeedbackStored
from tests.edge.api.test_sessions import STRANGE, STRANGE_PATH, answering
from tests.edge.test_errors import error_of

SUBJECT = subjects.history("feedback", subjects.ANY)
PATH = "/sessions/s1/messages/m1/feedback"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GIVEN = Feedback("down", "wrong city", "Rome.", "m0")
STORED = FeedbackStored(replace(GIVEN, preferred_session="s0", given_at=NOW), "demo", True)


async def test_put_sends_the_whole_feedback(http: httpx.AsyncClient, nats_url: str) -> None:
    body = {"rating": "down", "reason": "wrong city", "correction": "Rome.", "preferred_to": "m0"}
    async with answering(nats_url, SUBJECT, FeedbackRequest, STORED) as asked:
        answer = await http.put(f"/sessions/{STRANGE_PATH}/messages/m1/feedback", json=body)
        await http.put(PATH, json={"rating": "up", "reason": None})
    assert answer.status_code == 200
    assert answer.json() == body | {"preferred_session": "s0", "given_at": "2026-01-02T03:04:05Z"}
    assert [replace(each, request_id=None) for each in asked] == [
        FeedbackRequest(STRANGE, "m1", GIVEN),
        FeedbackRequest("s1", "m1", Feedback("up")),
    ]
    assert all(each.request_id for each in asked)


async def test_delete_removes_the_feedback(http: httpx.AsyncClient, nats_url: str) -> None:
    stored = FeedbackStored(None, "demo", True)
    async with answering(nats_url, SUBJECT, FeedbackRequest, stored) as asked:
        answer = await http.delete(PATH)
    assert (answer.status_code, answer.json()["status"]) == (200, "success")
    assert asked[0].feedback is None


@pytest.mark.parametrize("body", [b"{}", b'{"rating":null,"correction":null}'])
async def test_put_of_nothing_removes_the_feedback(
    http: httpx.AsyncClient, nats_url: str, body: bytes
) -> None:
    stored = FeedbackStored(None, "demo", True)
    async with answering(nats_url, SUBJECT, FeedbackRequest, stored) as asked:
        answer = await http.put(PATH, content=body)
    assert (answer.status_code, answer.json()) == (200, {})
    assert asked[0].feedback is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "Send JSON like"),
        (b"[]", "object"),
        (b'{"rating":"great"}', "rating"),
        (b'{"rating":1}', "rating"),
        (b'{"reason":""}', "reason"),
        (b'{"correction":"' + b"x" * 65_537 + b'"}', "correction"),
        (b'{"reason":"' + b"x" * 4_097 + b'"}', "reason"),
        (b'{"preferred_to":"a b"}', "preferred_to"),
        (b'{"preferred_session":"s","rating":"up"}', "preferred_session"),
        (b'{"given_at":"2026-01-02T03:04:05Z","rating":"up"}', "given_at"),
    ],
)
async def test_invalid_feedback_is_rejected_by_name(
    http: httpx.AsyncClient, nats_url: str, body: bytes, named: str
) -> None:
    async with answering(nats_url, SUBJECT, FeedbackRequest, STORED) as asked:
        answer = await http.put(PATH, content=body)
    assert answer.status_code == 400 and named in str(error_of(answer)["message"])
    assert asked == []


@pytest.mark.parametrize("message_id", ["a%20b", "x" * 65, "%0A"])
async def test_invalid_message_id_is_not_found(
    http: httpx.AsyncClient, nats_url: str, message_id: str
) -> None:
    async with answering(nats_url, SUBJECT, FeedbackRequest, STORED) as asked:
        path = f"/sessions/s1/messages/{message_id}/feedback"
        answers = [await http.put(path, json={"rating": "up"}), await http.delete(path)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert asked == []


async def test_unknown_message_is_a_404(http: httpx.AsyncClient, nats_url: str) -> None:
    missing = ServiceError("not_found", "No answer of this session has the id 'm1'.")
    async with answering(nats_url, SUBJECT, FeedbackRequest, missing):
        answer = await http.put(PATH, json={"rating": "up"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


async def test_new_feedback_is_counted_by_model_and_kind(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    unknown = replace(STORED, model="invented by an import")
    again = replace(STORED, is_new=False)
    async with answering(nats_url, SUBJECT, FeedbackRequest, STORED, unknown, again):
        before = await counts(http)
        for _ in range(3):
            await http.put(PATH, json={"rating": "down", "correction": "Rome."})
        after = await counts(http)
    new = {name: after[name] - before.get(name, 0) for name in after}
    assert sum(new.values()) == 4
    assert all("invented" not in name for name in new)


async def counts(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith("finetunellm_feedback_total"))
    return {name: float(value) for name, value in found}
