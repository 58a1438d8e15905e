"""
All workarounds for nats-py 2.16, as one subclass of its client.

Each one names the upstream issue, or describes a fault that is not reported yet so that it can be
filed at https://github.com/nats-io/nats.py/issues. tests/runtime holds a test of each.
"""

import asyncio
import logging
import re
from contextlib import suppress
from typing import Any

import nats.errors
from nats import micro
from nats.aio.client import Client, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
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

# Not reported: the parser's \s splits a control line at vertical tabs and form feeds too, which
# nats-server allows in a subject. A client that publishes such a subject could break the connection
# of a subscriber, or inject a message into any of its subscriptions.
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
        Connect to one of the servers.

        Not reported: from a URL, nats-py takes percent-encoded passwords without decoding them,
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
        Drop a message that can't be parsed.

        Not reported: a subject, reply or status that is not UTF-8, or a header block without a line
        end, raises in the read loop and ends it. The connection stays open and receives nothing.

        Log records are delivered anyway, so that they can be terminated, but without headers: a
        pull subscription takes a record with a status for a message of the server, and the record
        is never acknowledged.
        """
        if self._is_log_record(sid, subject, reply):
            subject, headers = subject.decode(errors="replace").encode(), b""
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception as error:
            self._dropped.warning(
                "dropped a message that can't be parsed error=%s", type(error).__name__
            )

    def _is_log_record(self, sid: int, subject: bytes, reply: bytes) -> bool:
        """Return whether JetStream delivers it, which alone sends other subjects to an inbox."""
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
        Ignore discovery requests whose reply subject is not an inbox (see subjects.is_reply).

        Not reported: nats-py's services answer $SRV requests on any reply subject, so a client can
        make a service publish where it may not publish itself.
        """
        message: Msg = super()._build_message(sid, subject, reply, data, headers)
        if message.subject.startswith("$SRV.") and not subjects.is_reply(message.reply):
            self._not_replied.warning(NOT_AN_INBOX, message.subject, message.reply)
            return None
        return message

    async def _process_err(self, err_msg: str) -> None:
        """
        Reconnect after an error that ends the connection.

        nats-py closes the client for good after any error but a stale connection, for example when
        its credentials expire: https://github.com/nats-io/nats.py/issues/1019
        """
        if parser.PERMISSIONS_ERR in err_msg or parser.STALE_CONNECTION in err_msg:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _read_loop(self) -> None:
        """
        Reconnect if the loop ends without a reason.

        Not reported: an unexpected exception in the read loop is logged and ends it. The client
        still counts as connected, receives nothing, and no callback runs.
        """
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
        Count headers as part of the payload, as nats-server does.

        nats-py compares only the data with `max_payload`, and nats-server closes the connection
        after a message that is too large: https://github.com/nats-io/nats.py/pull/888 corrects it
        in nats-core, not in nats-py.
        """
        if headers and payload_size + _size(headers) > self.max_payload:
            raise nats.errors.MaxPayloadError
        await super()._send_publish(subject, reply, payload, payload_size, headers)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """
        Require TLS for a `tls://` server, before anything is sent to it.

        nats-py sends credentials in plaintext if the server does not require TLS:
        https://github.com/nats-io/nats.py/pull/912 corrects it in nats-core, not in nats-py.
        """
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls":
            if not info.get("tls_required") and not info.get("tls_available"):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True  # makes nats-py upgrade the connection
        await super()._process_info(info, initial_connection)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """
        Send pending data first.

        Not reported: PING is written before the pending data, so its PONG does not confirm that the
        server has that data. After `flush` a subscription may be inactive; `drain` loses messages.
        """
        if self.is_connected and self._transport is not None:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _connect_to_server(self, s: Srv) -> None:
        """
        Close the previous connection.

        Not reported: if a server accepts a connection and never sends INFO, the attempt times out
        and its transport stays open; each further attempt leaks another one.
        """
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def _process_pong(self) -> None:
        """
        Ignore the PONG of a `flush` that has timed out.

        Not reported: its future is cancelled, so `set_result` raises InvalidStateError in the read
        loop, which ends. (Issue 624 is the same fault in the flusher.)
        """
        if self._pongs and self._pongs[0].done():
            del self._pongs[0]
            self._pings_outstanding = 0
        else:
            await super()._process_pong()


def _size(headers: dict[str, str]) -> int:
    lines = (len(key) + len(value.encode()) + LINE_OVERHEAD for key, value in headers.items())
    return HEADER_OVERHEAD + sum(lines)


async def drain_service(service: micro.Service) -> None:
    """
    Stop the service after its requests in flight were handed to their handlers.

    Not reported: `Service.stop` unsubscribes its endpoints at once instead of draining them, so
    requests that the server has already assigned to this member are lost.
    """
    endpoints, service._endpoints = service._endpoints, []
    for endpoint in endpoints:
        if endpoint._subscription is not None:
            await endpoint._subscription.drain()
    await service.stop()


async def unsubscribe(subscription: Subscription) -> None:
    """Unsubscribe, also if the subscription has ended with its connection."""
    with suppress(nats.errors.BadSubscriptionError, nats.errors.ConnectionClosedError):
        await subscription.unsubscribe()


class ErrorReporter:
    """Log a connection error once until it changes. nats-py reports each failed attempt."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._last = ""

    async def on_error(self, error: Exception) -> None:
        if (text := str(error) or type(error).__name__) != self._last:
            log.warning("NATS at %s: %s; still trying", self._servers, text)
            self._last = text
