"""
What nats-py lacks for us: a flush that flushes, connections that are closed, answers to inboxes
alone, and complaints that are said once.
"""

import asyncio
import logging

from nats.aio.client import Client, Srv

from services.contract import subjects

log = logging.getLogger(__name__)


class OrderlyClient(Client):
    """
    nats-py's flush sends its PING before what is still pending. Its end would not mean that a
    subscription is there, and a drain would lose what comes before the server hears of it.
    """

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if self.is_connected and self._transport is not None:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _connect_to_server(self, s: Srv) -> None:
        """nats-py forgets, open, the connection to a server that froze before it said a word."""
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def _process_pong(self) -> None:
        """nats-py loses the connection over the answer to a ping that nobody waits for any more."""
        if self._pongs and self._pongs[0].done():
            del self._pongs[0]
            self._pings_outstanding = 0
        else:
            await super()._process_pong()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """nats-py's services say who they are wherever they are told to: see subjects.is_reply."""
        if not subject.startswith(b"$SRV.") or subjects.is_reply(reply.decode()):
            await super()._process_msg(sid, subject, reply, data, headers)


class Complaints:
    """
    nats-py complains at each failed attempt, several times a second: said once until it is
    another.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last = ""

    async def hear(self, error: Exception) -> None:
        if (text := str(error) or type(error).__name__) != self._last:
            log.warning("NATS at %s: %s; still trying", self._url, text)
            self._last = text
