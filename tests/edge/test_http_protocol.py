import asyncio
from typing import cast

import httpx

from services.contract.messages import Started, Token
from services.edge.http_protocol import ResponseTransport, WriteBatch
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
        self._written.append(b"closed")


def recorded() -> tuple[list[bytes], ResponseTransport]:
    written: list[bytes] = []
    return written, ResponseTransport(cast(asyncio.Transport, RecordedTransport(written)))


async def test_head_is_written_with_what_follows() -> None:
    written, response = recorded()
    response.write(b"head,")
    response.write(b"event,")
    response.write(b"event,")
    await asyncio.sleep(0)
    assert written == [b"head,event,", b"event,"]


async def test_head_does_not_wait_for_a_late_event() -> None:
    written, response = recorded()
    response.write(b"head,")
    await asyncio.sleep(0)
    response.write(b"event,")
    assert written == [b"head,", b"event,"]


async def test_head_is_written_before_its_connection_closes() -> None:
    written, response = recorded()
    response.write(b"head,")
    response.close()
    await asyncio.sleep(0)
    assert written == [b"head,", b"closed"]


async def test_batch_is_written_in_order_once_the_callback_has_ended() -> None:
    written: list[bytes] = []
    closed, *both = (RecordedTransport(written, is_closing) for is_closing in (True, False, False))
    batch = WriteBatch()
    for transport, data in ((both[0], b"1"), (closed, b"2"), (both[1], b"3"), (both[0], b"4")):
        batch.add(cast(ResponseTransport, transport), data)
    assert written == []
    await asyncio.sleep(0)
    assert written == [b"1", b"3", b"4"]
    batch.add(cast(ResponseTransport, both[1]), b"5")
    await asyncio.sleep(0)
    assert written[3:] == [b"5"]


async def test_failing_connection_costs_others_no_chunk() -> None:
    written: list[bytes] = []
    batch = WriteBatch()
    for transport in (RecordedTransport(written, is_broken=True), RecordedTransport(written)):
        batch.add(cast(ResponseTransport, transport), b"1")
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
