import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from services.runtime import logs, trace_context
from services.runtime.logs import LogFormat, RateLimitedLog

SECRET = "hush"
Configure = Callable[[LogFormat], None]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Configure the log of the service `edge`; restores the log of the tests."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield lambda log_format: logs.configure("edge", log_format)
    logging.captureWarnings(False)
    root.handlers[:], root.level = before


async def log_from_two_requests() -> None:
    async def handle(request_id: str) -> None:
        logs.request_id.set(request_id)
        await asyncio.sleep(0)
        logging.info("for %s", request_id)

    await asyncio.gather(handle("r1"), handle("r2"))
    logging.info("for nobody")


def log_secrets() -> None:
    try:
        raise ValueError("bad: 'mongodb+srv://u:hush/hu@sh@host/' of nats://hush@a:1,nats://b")
    except ValueError:
        logging.exception("connecting to %s", "tls://u:hush@host:4222")


async def test_text_line_has_time_level_service_and_request_id(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("text")
    began = datetime.now(UTC)
    await log_from_two_requests()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "INFO    edge      [r1] for r1",
        "INFO    edge      [r2] for r2",
        "INFO    edge      [-] for nobody",
    ]
    time = lines[0].partition(" ")[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs((datetime.fromisoformat(time) - began).total_seconds()) < 5


async def test_json_line_has_the_fields_of_a_text_line(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("json")
    await log_from_two_requests()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["request_id"], line["message"]) for line in lines] == [
        ("r1", "for r1"),
        ("r2", "for r2"),
        (None, "for nobody"),
    ]
    assert datetime.fromisoformat(lines[0].pop("time")).tzinfo is not None
    assert lines[0] == {
        "level": "INFO",
        "service": "edge",
        "request_id": "r1",
        "trace_id": None,
        "logger": "root",
        "message": "for r1",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_line_of_a_request_has_its_trace_id(
    log_format: LogFormat, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(log_format)
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    with trace_context.received({"traceparent": f"00-{trace_id}-00f067aa0ba902b7-00"}):
        logging.info("in it")
    logging.info("after it")
    inside, after = capsys.readouterr().err.splitlines()
    if log_format == "text":
        assert inside.endswith(f"[-] in it trace_id={trace_id}") and after.endswith(" after it")
    else:
        assert [json.loads(line)["trace_id"] for line in (inside, after)] == [trace_id, None]


def test_json_traceback_and_line_breaks_stay_on_one_line(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("json")
    try:
        raise ValueError("bad\nvalue \ud800")
    except ValueError:
        logging.exception("two\nlines\u2028and \udc80")
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields["message"] == "two\nlines\u2028and \udc80"
    assert fields["exception"].startswith("Traceback (most recent call last):\n")
    assert fields["exception"].endswith("ValueError: bad\nvalue \ud800")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_credentials_in_urls_are_masked(
    configure: Configure, log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(log_format)
    log_secrets()
    log = capsys.readouterr().err
    assert SECRET not in log
    assert "connecting to tls://***@host:4222" in log and "mongodb+srv://***@host/" in log


def test_rate_limited_log_counts_omitted_events(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(logging.getLogger("test"), interval=60)
    for number in range(100):
        limited.warning("event %d", number)
    assert [record.message for record in caplog.records] == ["event 0 (1 since the start)"]
    assert limited.count == 100
