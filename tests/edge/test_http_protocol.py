import asyncio
from typing import cast

import httpx

from services.contract.messages import Started, Token
from services.edge.http_protocol import MAX_HELD_BYTES, ResponseTransport, WriteBatch
from tests.fakes import ACCEPTED, DONE, Script, scripted_worker


class RecordedTransport:
    """A transport that notes what is written to it in a list that several share."""

    def __init__(
        self, written: list[bytes], is_closing: bool = False, is_broken: bool = False
    ) -> None:
        self._written = written
        self._is_closing = is_closing
        self._is_broken = is_broken

    def is_closing(self) -> bool:
        return self._is_closing

    def write(self, data: bytes) -> None:
        if self._is_broken:
            raise RuntimeError("broken")
        self._written.append(data)

    def abort(self) -> None:
        self._written.append(b"aborted")

    def close(self) -> None:
        self._is_closing = True
        self._written.append(b"closed")


def response(written: list[bytes], batch: WriteBatch, **state: bool) -> ResponseTransport:
    transport = cast(asyncio.Transport, RecordedTransport(written, **state))
    return ResponseTransport(transport, batch)


async def test_head_and_first_events_are_sent_together() -> None:
    written: list[bytes] = []
    stream = response(written, WriteBatch())
    for data in (b"head,", b"event,", b"event,"):
        stream.write(data)
    assert written == []
    await asyncio.sleep(0)
    stream.write(b"later,")
    await asyncio.sleep(0)
    assert written == [b"head,event,event,", b"later,"]


async def test_what_is_written_is_sent_before_the_connection_closes() -> None:
    written: list[bytes] = []
    stream = response(written, WriteBatch())
    stream.write(b"head,")
    stream.close()
    await asyncio.sleep(0)
    assert written == [b"head,", b"closed"]


async def test_much_is_sent_without_waiting_for_more() -> None:
    written: list[bytes] = []
    stream = response(written, WriteBatch())
    stream.write(b"head,")
    stream.write(b"x" * MAX_HELD_BYTES)
    assert written == [b"head," + b"x" * MAX_HELD_BYTES]
    stream.write(b"more,")
    await asyncio.sleep(0)
    assert written[1:] == [b"more,"]


async def test_responses_are_sent_in_order_once_the_callback_has_ended() -> None:
    written: list[bytes] = []
    batch = WriteBatch()
    closed = response(written, batch, is_closing=True)
    first, second = response(written, batch), response(written, batch)
    for stream, data in ((first, b"1"), (closed, b"2"), (second, b"3"), (first, b"4")):
        stream.write(data)
    assert written == []
    await asyncio.sleep(0)
    assert written == [b"14", b"3"]


async def test_failing_connection_costs_others_no_chunk() -> None:
    written: list[bytes] = []
    batch = WriteBatch()
    for is_broken in (True, False):
        response(written, batch, is_broken=is_broken).write(b"1")
    await asyncio.sleep(0)
    assert written == [b"aborted", b"1"]


async def test_answer_that_comes_in_one_go_keeps_its_order(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    tokens = [Token(2 * number, f"{number % 10} ", (number,)) for number in range(300)]
    script: Script = [ACCEPTED, Started(5, 0, 0, 0), *tokens, DONE]
    async with scripted_worker(nats_url, script):
        answers = await asyncio.gather(
            *(http.post("/chat", json={"prompt": "hi"}) for _ in range(5))
        )
    for answer in answers:
        *events, done, rest = answer.text.split("\n\n")
        assert [event.partition("\n")[0] for event in events] == [f"id: {t.end}" for t in tokens]
        assert done.startswith("id: end\n") and rest == ""
