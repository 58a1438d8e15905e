"""Datasets over HTTP, of a real history service without MongoDB."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import (
    ExportPage,
    ExportRequest,
    Feedback,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.runtime.bus import Bus
from tests.edge.api.test_sessions import NOW
from tests.edge.conftest import LIMITS, edge_on
from tests.edge.test_errors import error_of
from tests.history.samples import FAST, append, describe, erase, exchange, give_feedback, history


class Tenants:
    """Two tenants with keys, and an admin."""

    def __init__(self) -> None:
        self.ann, self.bob = (f"t{uuid4().hex[:8]}" for _ in range(2))

    @property
    def keys(self) -> ApiKeys:
        return ApiKeys(
            ApiKey(name=name, sha256=sha256_of(self._key(name)), admin=name == "boss")
            for name in (self.ann, self.bob, "boss")
        )

    def headers(self, name: str) -> dict[str, str]:
        return {"X-API-Key": self._key(name)}

    def _key(self, name: str) -> str:
        return f"the secret key of {name}"


@pytest.fixture
async def served(nats_url: str) -> AsyncIterator[None]:
    async with history(nats_url):
        yield


def lines_in(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_tenant_gets_its_own_conversations_by_session(
    nats_url: str, bus: Bus, served: None
) -> None:
    of = Tenants()
    async with edge_on(bus, of.keys) as http:
        for name, session in ((of.ann, "b"), (of.ann, "a"), (of.bob, "c")):
            await append(bus, session, exchange("r1"), name)
            await append(bus, session, exchange("r2"), name)
        await describe(bus, "a", of.ann, system_prompt="Be kind.")
        await give_feedback(bus, "b", "r1", Feedback("down", correction="right"), of.ann)
        sft = lines_in(await http.get("/datasets/sft", headers=of.headers(of.ann)))
        pairs = lines_in(await http.get("/datasets/preferences", headers=of.headers(of.ann)))
        head = await http.head("/datasets/sft", headers=of.headers(of.ann))
    assert [line["session_id"] for line in sft] == ["a", "b"]
    assert sft[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert sft[1]["messages"][1]["content"] == "right"
    assert [(line["session_id"], line["source"]) for line in pairs] == [("b", "correction")]
    assert "tenant" not in sft[0]
    assert (head.status_code, head.content) == (200, b"")


async def test_admin_gets_one_tenant_or_all(nats_url: str, bus: Bus, served: None) -> None:
    of = Tenants()
    async with edge_on(bus, of.keys) as http:
        for name in (of.ann, of.bob):
            await append(bus, "s", exchange("r1"), name)
        one = await http.get(f"/datasets/sft?tenant={of.bob}", headers=of.headers("boss"))
        every = await http.get("/datasets/sft?tenant=*", headers=of.headers("boss"))
        refused = await http.get(f"/datasets/sft?tenant={of.bob}", headers=of.headers(of.ann))
        invalid = await http.get("/datasets/sft?tenant=a.b", headers=of.headers("boss"))
    assert [line["tenant"] for line in lines_in(one)] == [of.bob]
    assert [line["tenant"] for line in lines_in(every)] == sorted((of.ann, of.bob))
    assert (refused.status_code, invalid.status_code) == (403, 400)


async def test_filters_select_sessions_and_answers(nats_url: str, bus: Bus, served: None) -> None:
    of = Tenants()
    async with edge_on(bus, of.keys) as http:
        for session in ("a", "b"):
            for request_id in ("r1", "r2"):
                await append(bus, session, exchange(request_id), of.ann)
        await give_feedback(bus, "a", "r1", Feedback("up"), of.ann)

        async def found(query: str) -> list[tuple[str, str]]:
            answer = await http.get(f"/datasets/sft?{query}", headers=of.headers(of.ann))
            return [(line["session_id"], line["message_id"]) for line in lines_in(answer)]

        assert await found("rating=up") == [("a", "r1")]
        assert await found("session_id=b") == [("b", "r2")]
        assert await found("session_id=unknown") == []
        assert await found("model=other") == []
        assert await found("since=2020-01-01T00:00:00Z&session_id=a") == [("a", "r1"), ("a", "r2")]
        assert await found("until=2020-01-01T00:00:00Z") == []
        await erase(bus, "a", of.ann)
        assert await found("") == [("b", "r2")]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("rating=good", "The URL parameter `rating`"),
        ("since=yesterday", "The URL parameter `since` must be a time such as 2026"),
        ("until=2026-01-01T00:00", "The URL parameter `until` must be a time such as 2026"),
        ("until=2026-01-01T00:00:00", "The URL parameter `until` must be a time such as 2026"),
        ("ratin=up", "unknown field `ratin`"),
        ("tenant=a.b", "The URL parameter `tenant`"),
    ],
)
async def test_invalid_filter_is_rejected_by_name(
    http: httpx.AsyncClient, query: str, named: str
) -> None:
    answer = await http.get(f"/datasets/preferences?{query}")
    assert answer.status_code == 400 and named in str(error_of(answer)["message"])


async def test_session_of_many_pages_is_read_whole(nats_url: str, bus: Bus) -> None:
    of = Tenants()
    small = dataclasses.replace(FAST, export_page=3)
    limits = dataclasses.replace(LIMITS, dataset_sessions=2)
    async with history(nats_url, limits=small), edge_on(bus, of.keys, limits=limits) as http:
        for session in "dcbae":
            for number in range(5):
                await append(bus, session, exchange(f"r{number}"), of.ann)
        lines = lines_in(await http.get("/datasets/sft", headers=of.headers(of.ann)))
    assert [line["session_id"] for line in lines] == list("abcde")
    assert {len(line["messages"]) for line in lines} == {10}


class MovingSessions:
    """A history whose sessions get records while they are listed, and whose pages may fail."""

    def __init__(self, failures: int = 0, code: str = "overloaded") -> None:
        self.failures = failures
        self.code = code
        self.lists = 0

    async def sessions(self, subject: str, request: SessionsRequest) -> SessionPage:
        """Session `b` moves to the begin before the second page is read."""
        self.lists += 1
        pages = [("c", "a2"), ("a",), ("b", "c"), ("a2", "a"), ("b", "c")]
        ids = pages[min(self.lists, len(pages)) - 1]
        listed = tuple(Session(each, "", None, 1, NOW) for each in ids)
        return SessionPage(listed, "1-1" if self.lists in (1, 3) else None)

    async def export(self, subject: str, request: ExportRequest) -> ExportPage:
        if request.session_id == "b" and self.failures:
            self.failures -= 1
            raise ServiceError(self.code, "Busy.", retry_after=0.01)  # type: ignore[arg-type]
        return ExportPage((exchange(request.session_id),))


async def read_from(nats_url: str, bus: Bus, moving: MovingSessions) -> httpx.Response:
    async with Bus.connect(nats_url, "scripted") as other, edge_on(bus, limits=LIMITS) as http:
        any_tenant = subjects.ANY
        listing = subjects.history("sessions", any_tenant)
        exporting = subjects.history("export", any_tenant)
        endpoints = [
            other.endpoint("sessions", listing, SessionsRequest, moving.sessions),
            other.endpoint("export", exporting, ExportRequest, moving.export),
        ]
        await other.serve("history", "scripted", endpoints)
        return await http.get("/datasets/sft")


async def test_session_that_moves_while_listed_is_not_missed(nats_url: str, bus: Bus) -> None:
    lines = lines_in(await read_from(nats_url, bus, MovingSessions()))
    assert [line["session_id"] for line in lines] == ["a", "a2", "b", "c"]


async def test_page_is_read_again_after_a_temporary_error(nats_url: str, bus: Bus) -> None:
    lines = lines_in(await read_from(nats_url, bus, MovingSessions(failures=3)))
    assert [line["session_id"] for line in lines] == ["a", "a2", "b", "c"]


async def test_list_ends_while_sessions_keep_beginning(nats_url: str, bus: Bus) -> None:
    class Growing(MovingSessions):
        async def sessions(self, subject: str, request: SessionsRequest) -> SessionPage:
            self.lists += 1
            return SessionPage(tuple(Session(f"s{n}", "", None, 1, NOW) for n in range(self.lists)))

    lines = lines_in(await read_from(nats_url, bus, Growing()))
    assert len(lines) > 1


@pytest.mark.parametrize(("failures", "code"), [(99, "overloaded"), (1, "internal")])
async def test_cut_dataset_breaks_the_connection(
    nats_url: str, bus: Bus, failures: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await read_from(nats_url, bus, MovingSessions(failures, code))
    assert f"response cut path=/datasets/sft code={code}: Busy." in caplog.text
    assert "Traceback" not in caplog.text


async def test_error_before_the_first_line_has_a_status(http: httpx.AsyncClient) -> None:
    answer = await http.get("/datasets/sft")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "history_unavailable")
