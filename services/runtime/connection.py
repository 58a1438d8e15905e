"""
All workarounds for nats-py 2.16, each with its reason. None of them is fixed upstream, unless a
link says so.
"""

import asyncio
import logging
import re
from typing import Any

import nats.errors
from nats.aio.client import Client, Srv
from nats.aio.msg import Msg
from nats.protocol import parser

from services.contract import subjects
from services.runtime.logs import RateLimitedLog
from services.runtime.nats_url import Servers

HEADER_OVERHEAD = 12  # bytes of a header block around its lines
LINE_OVERHEAD = 4  # bytes of a header line around its key and its value
NOT_AN_INBOX = (
    "dropped a request on %r: its reply subject %.100r is not an inbox (_INBOX.… or _INBOX_name.…)"
)

log = logging.getLogger(__name__)

# nats-py also splits a control line at vertical tabs and form feeds, which nats-server allows in a
# subject: a client that publishes such a subject could break the connection, or inject a message
# into any subscription.
parser.MSG_RE = re.compile(rb"\AMSG +([^ \t\r\n]+) +(\d+) +(([^ \t\r\n]+) +)?(\d+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG +([^ \t\r\n]+) +(\d+) +(([^ \t\r\n]+) +)?(\d+) +(\d+)\r\n")


class ResilientClient(Client):
    """A nats-py client that stays connected whatever other clients publish."""

    def __init__(self) -> None:
        super().__init__()
        self._dropped = RateLimitedLog(log)
        self._not_replied = RateLimitedLog(log)

    @property
    def dropped_frames(self) -> int:
        """Return how many messages could not be parsed since the start."""
        return self._dropped.count

    async def open(self, servers: Servers, **options: Any) -> None:
        """
        Connect to one of the servers. nats-py by itself does not decode percent-encoded passwords,
        sends none to servers that a cluster announces, and shows them in its errors.
        """
        await self.connect(
            list(servers.urls),
            user=servers.user,
            password=servers.password,
            token=servers.token,
            **options,
        )

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """
        Drop a message that can't be parsed. In nats-py a subject, reply or status that is not
        UTF-8, or a header block without a line end, ends the read loop; the connection stays open
        and receives nothing.

        A log record is still delivered, so that it can be set aside, but without its headers:
        nats-py would treat a record with a status as a message of the server, which nobody
        acknowledges.
        """
        if self._is_log_record(sid, subject, reply):
            subject, headers = subject.decode(errors="replace").encode(), b""
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception as error:
            self._dropped.warning(
                "dropped a message from NATS that can't be parsed (%s)", type(error).__name__
            )

    def _is_log_record(self, sid: int, subject: bytes, reply: bytes) -> bool:
        """Return whether JetStream delivers it: only JetStream sends other subjects to an inbox."""
        subscription = self._subs.get(sid)
        return (
            subscription is not None
            and reply.startswith(b"$JS.ACK.")
            and subscription.subject.startswith("_INBOX.")
            and not subject.startswith(b"_INBOX.")
        )

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg | None:
        """
        Ignore discovery requests whose reply subject is not an inbox: nats-py's services reply to
        any subject (see subjects.is_reply).
        """
        message: Msg = super()._build_message(sid, subject, reply, data, headers)
        if message.subject.startswith("$SRV.") and not subjects.is_reply(message.reply):
            self._not_replied.warning(NOT_AN_INBOX, message.subject, message.reply)
            return None
        return message

    async def _process_err(self, err_msg: str) -> None:
        """
        Reconnect after an error that ends the connection. nats-py closes the client for good after
        any error but a stale connection, for example when the user's credentials expire.
        """
        if parser.PERMISSIONS_ERR in err_msg or parser.STALE_CONNECTION in err_msg:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _read_loop(self) -> None:
        """Reconnect if the loop ends without a reason: nats-py keeps the connection, unread."""
        await super()._read_loop()
        if self._status == Client.CONNECTED and asyncio.current_task() is self._reading_task:
            await self._process_op_err(nats.errors.ProtocolError())

    async def _send_publish(
        self,
        subject: str,
        reply: str,
        payload: bytes,
        payload_size: int,
        headers: dict[str, Any] | None,
    ) -> None:
        """
        Count the headers as part of the payload, as nats-server does, which closes the connection
        after a message that is too large.
        """
        if headers and payload_size + _size(headers) > self.max_payload:
            raise nats.errors.MaxPayloadError
        await super()._send_publish(subject, reply, payload, payload_size, headers)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """
        Require TLS for a `tls://` server, before anything is sent to it. nats-py continues in
        plaintext if the server does not require TLS.
        """
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls":
            if not info.get("tls_required") and not info.get("tls_available"):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True  # makes nats-py upgrade the connection
        await super()._process_info(info, initial_connection)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """
        Send pending data first. nats-py's PING overtakes it, so a completed flush would not mean
        that a subscription is active, and a drain would lose messages.
        """
        if self.is_connected and self._transport is not None:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _connect_to_server(self, s: Srv) -> None:
        """Close the last connection: nats-py leaves it open if the server never sent INFO."""
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def _process_pong(self) -> None:
        """Ignore the PONG for a ping whose waiter gave up: nats-py drops the connection."""
        if self._pongs and self._pongs[0].done():
            del self._pongs[0]
            self._pings_outstanding = 0
        else:
            await super()._process_pong()


def _size(headers: dict[str, str]) -> int:
    lines = (len(key) + len(value.encode()) + LINE_OVERHEAD for key, value in headers.items())
    return HEADER_OVERHEAD + sum(lines)


class ErrorReporter:
    """Log a connection error once until it changes: nats-py reports each failed attempt."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._last = ""

    async def on_error(self, error: Exception) -> None:
        if (text := str(error) or type(error).__name__) != self._last:
            log.warning("NATS at %s: %s; still trying", self._servers, text)
            self._last = text
