"""An answer that is read again: from another event on, at another edge, after its end."""

import json

import httpx
import pytest

from services.runtime.bus import Bus
from tests.client.tellers import STORY, teller
from tests.edge.conftest import edge_on
from tests.fakes import history_of

JSON = {"prompt": "hi"}


async def until_said(answer: httpx.Response, text: str) -> str:
    """The id of the event with which so much was said; leaves then."""
    said = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        if line.startswith("data: "):
            said += json.loads(line.removeprefix("data: ")).get("token", "")
        if said.startswith(text):
            return last_id
    raise AssertionError(said)


def text_of(answer: httpx.Response) -> str:
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data")]
    assert events[-1]["done"], "the last event is the end"
    return "".join(event["token"] for event in events[:-1])


async def test_an_answer_goes_on_at_another_edge_where_it_was_left(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "one") as one,
        Bus.connect(nats_url, "two") as two,
        edge_on(one) as first,
        edge_on(two) as second,
        teller(nats_url) as worker,
    ):
        async with first.stream("POST", "/chat", json=JSON) as answer:
            last_id = await until_said(answer, STORY[:9])
            address = answer.headers["content-location"]
        for _ in range(2):  # while it runs, and after its end
            rest = await second.get(address, headers={"Last-Event-ID": last_id})
            assert rest.headers["content-type"].startswith("text/event-stream")
            assert rest.headers["content-location"] == address
            assert text_of(rest) == STORY[int(last_id) :]
        assert text_of(await second.get(address)) == STORY
        assert len(worker.requests) == 1 and worker.cancelled == []


async def test_the_rest_of_an_answer_that_was_read_to_its_end_is_its_end(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with teller(nats_url):
        address = (await http.post("/chat", json=JSON)).headers["content-location"]
        rest = await http.get(address, headers={"Last-Event-ID": str(len(STORY))})
        assert text_of(rest) == ""


async def test_resume_after_the_end_is_204_which_stops_an_event_source(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with teller(nats_url):
        whole = await http.post("/chat", json=JSON)
        *_, end_id = [line[4:] for line in whole.text.splitlines() if line.startswith("id: ")]
        address = whole.headers["content-location"]
        after_the_end = await http.get(address, headers={"Last-Event-ID": end_id})
    assert (after_the_end.status_code, after_the_end.content) == (204, b"")
    assert (await http.get("/chat/a*b", headers={"Last-Event-ID": end_id})).status_code == 404


async def test_post_with_a_last_event_id_and_no_key_is_refused(http: httpx.AsyncClient) -> None:
    for last_id in ("5", "end"):
        answer = await http.post("/chat", json=JSON, headers={"Last-Event-ID": last_id})
        assert answer.status_code == 400
        assert "Idempotency-Key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("last_id", ["-1", "x", "1.5", "٣", "9" * 10])
async def test_an_id_that_no_event_has_is_refused(http: httpx.AsyncClient, last_id: str) -> None:
    answer = await http.get("/chat/r", headers=[(b"last-event-id", last_id.encode())])
    assert answer.status_code == 400
    assert "Last-Event-ID" in answer.json()["error"]["message"]


async def test_what_nobody_knows_of_is_404(
    http: httpx.AsyncClient, bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url), history_of(bus, None):
        assert (await http.get("/chat/unknown")).status_code == 404
        assert (await http.get("/chat/a*b")).status_code == 404


async def test_nobody_reads_the_answers_of_another_tenant(bus: Bus, nats_url: str) -> None:
    async with edge_on(bus, "acme:s3cret") as http, teller(nats_url):
        async with Bus.connect(nats_url, "open") as other, edge_on(other) as open_edge:
            address = (await open_edge.post("/chat", json=JSON)).headers["content-location"]
            assert text_of(await open_edge.get(address)) == STORY
        async with history_of(bus, None):
            answer = await http.get(address, headers={"X-API-Key": "s3cret"})
        assert answer.status_code == 404
        assert (await http.get(address)).status_code == 401
