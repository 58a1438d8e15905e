import logging

import httpx
import pytest

from services.runtime import logs


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (b"trace 1/a", "trace 1/a"),
        (b"x" * 100, "x" * 64),
        (b"a\xffb\tc", "abc"),
    ],
)
async def test_printable_part_of_the_request_id_is_echoed(
    http: httpx.AsyncClient, given: bytes, echoed: str
) -> None:
    answer = await http.get("/nope", headers={b"X-Request-Id": given})
    assert answer.headers["x-request-id"] == echoed


async def test_request_without_an_id_gets_one(http: httpx.AsyncClient) -> None:
    ids = {(await http.get("/healthz")).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


async def test_request_is_one_log_line_without_its_query(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "services.edge.access_log")
    monkeypatch.setattr(caplog.handler, "formatter", logs.TextFormatter("edge"))
    await http.get("/no%0Apath?session_id=private", headers={"X-Request-Id": "mine"})
    await http.get("/healthz")
    (line,) = caplog.text.splitlines()
    assert "[mine] request finished method=GET path=/no%0Apath status=404 ms=" in line
