"""
All workarounds for nats-py 2.16, as one subclass of its client.

Each one names the upstream issue, or describes a fault that is not reported yet so that it can be
filed at https://github.com/nats-io/nats.py/issues. tests/runtime holds a test of each.
"""

import asyncio
import logging
import math
import re
import ssl
import time
from collections import deque
from contextlib import suppress
from typing import Any

import nats.errors
from nats import micro
from nats.aio.client import Client, RawCredentials, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol import parser

from services.contract import subjects
from services.runtime.access import NatsAccess, read_credentials
from services.runtime.deliveries import NO_HEADERS, Receive
from services.runtime.direct_parser import DirectParser
from services.runtime.logs import RateLimitedLog
from services.runtime.nats_url import Servers
from services.runtime.settings import InvalidSetting

HEADER_OVERHEAD = 12  # bytes of a header block around its lines
LINE_OVERHEAD = 4  # bytes of a header line around its key and its value
NOT_AN_INBOX = (
    "dropped a request on %r: its reply subject %.100r is not an inbox (_INBOX.… or _INBOX_name.…),"
    " or another tenant waits there"
)

CHECK_CREDENTIALS = "check NATS_CREDS, or user and password in NATS_URL"
CHECK_CERTIFICATE = "check NATS_TLS_CERT, which an authority of the server must have signed"
NOT_PERMITTED = (
    "NATS at %s refuses: %s. Give this user the permissions of its service in"
    " deploy/nats/permissions.conf, and check NATS_INBOX_PREFIX"
)
DOT_CREDS = """\
-----BEGIN NATS USER JWT-----
{}
------END NATS USER JWT------
-----BEGIN USER NKEY SEED-----
{}
------END USER NKEY SEED------
"""
# https://github.com/nats-io/nats-server/blob/main/server/errors.go; a busy server may also report a
# timeout of the authentication, which the next attempt may not meet
_REJECTED_USER = re.compile(
    "authorization violation|authentication (expired|revoked)", re.IGNORECASE
)
_MESSAGE_SIZE = re.compile(rb"(?<=\r\nNats-Msg-Size: )\d+(?=\r\n)")
_MESSAGE_TTL = re.compile(rb"(?<=\r\nNats-TTL: )\d+(?=\r\n)")
_REJECTED_CERTIFICATE = re.compile("_ALERT_.*(CERTIFICATE|UNKNOWN_CA)")

log = logging.getLogger(__name__)

# Not reported: the parser's \s splits a control line at vertical tabs and form feeds too, which
# nats-server allows in a subject. A client that publishes such a subject could break the connection
# of a subscriber, or inject a message into any of its subscriptions.
parser.MSG_RE = re.compile(rb"\AMSG +([^ \t\r\n]+) +(\d+) +(([^ \t\r\n]+) +)?(\d+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG +([^ \t\r\n]+) +(\d+) +(([^ \t\r\n]+) +)?(\d+) +(\d+)\r\n")


class ResilientClient(Client):
    """A nats-py client that stays connected whatever other clients publish."""

    def __init__(self, servers: Servers, access: NatsAccess) -> None:
        super().__init__()
        self._servers = servers
        self._access = access
        self._was_connected = False
        self._dropped = RateLimitedLog(log)
        self._pinged_at: deque[float] = deque()  # of `_pongs`, the pings that were not answered
        self.confirmed_at = -math.inf
        """Time, of time.monotonic(), at which the last ping was sent that the server answered."""
        self._not_replied = RateLimitedLog(log)
        self._receivers: dict[bytes, Receive] = {}  # by id of the subscription
        self._ps = DirectParser(self, self._take)

    async def subscribe_directly(self, subject: str, receive: Receive) -> Subscription:
        """
        Call `receive` with each message as soon as it was read.

        A subscription of nats-py has a task and a queue of its own, which cost 20 µs a message.
        """
        subscription = await self.subscribe(subject)
        subscription._message_iterator = None  # refers back to it, so neither would be freed
        self._receivers[b"%d" % subscription._id] = receive
        queue = subscription._pending_queue
        while not queue.empty():  # arrived before the line above
            message = queue.get_nowait()
            queue.task_done()  # else `drain` waits for it
            receive(message.subject, message.data, message.reply, message.headers or NO_HEADERS)
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._receivers.pop(b"%d" % sid, None)
        super()._remove_sub(sid, max_msgs)

    @property
    def dropped_frames(self) -> int:
        """Return how many messages could not be parsed since the start."""
        return self._dropped.count

    async def open(self, **options: Any) -> None:
        """
        Connect to one of the servers.

        Not reported: from a URL, nats-py takes percent-encoded passwords without decoding them,
        sends none to servers that a cluster announces, and shows them in its errors.
        """
        await self.connect(
            list(self._servers.urls),
            user=self._servers.user,
            password=self._servers.password,
            token=self._servers.token,
            tls=self._access.tls,
            inbox_prefix=self._access.inbox_prefix,
            **options,
        )

    async def _process_connect_init(self) -> None:
        """
        Read the credentials again, and report at the first connect that a server rejects them.

        Not reported: nats-py keeps the public key of the seed that it read first, so after a
        rotation it can't reconnect. And it takes a connection that ends instead of a PONG, as after
        a TLS handshake without the client's certificate, for an established one.
        """
        self._use_credentials()
        try:
            await super()._process_connect_init()
            if self._status == Client.CONNECTING:
                tasks = (self._reading_task, self._ping_interval_task, self._flusher_task)
                for task in filter(None, tasks):
                    task.cancel()
                raise nats.errors.UnexpectedEOF
        except (nats.errors.Error, ssl.SSLError) as error:
            if self._was_connected or not (advice := _advice(error)):
                raise
            await self._close(Client.CLOSED, False)
            raise InvalidSetting(
                f"NATS at {self._servers} rejects the credentials ({_text(error)}): {advice}."
            ) from error
        self._was_connected = True

    def _use_credentials(self) -> None:
        """Raises nats.errors.Error if the file can't be used any more: then it is tried again."""
        path = self._access.credentials_file
        if path is None or self._servers.has_credentials:
            return
        try:
            seed, jwt = read_credentials(path)
        except InvalidSetting as error:
            raise nats.errors.Error(str(error)) from error
        self._auth_configured = True
        self._user_jwt_cb = None
        self._user_credentials = RawCredentials(DOT_CREDS.format(jwt, seed)) if jwt else None
        self._nkeys_seed_str = None if jwt else seed
        self._setup_nkeys_connect()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """
        Drop a message that can't be parsed.

        Not reported: a subject, reply or status that is not UTF-8, or a header block without a line
        end, raises in the read loop and ends it. The connection stays open and receives nothing.

        Log records are delivered anyway, so that they can be terminated. Of their headers only
        those are kept that tell of a record without its data: a pull subscription would take a
        record with a status for a message of the server, and never acknowledge it.
        """
        receive = self._receivers.get(b"%d" % sid)
        if receive is None and self._is_log_record(sid, subject, reply):
            subject, headers = subject.decode(errors="replace").encode(), _size_and_ttl(headers)
        try:
            if receive is None:
                await super()._process_msg(sid, subject, reply, data, headers)
            else:
                parsed = await self._process_headers(headers) if headers else None
                receive(subject.decode(), data, reply.decode(), parsed or NO_HEADERS)
        except Exception as error:
            self._drop(error)

    def _take(self, sid: bytes, subject: bytes, data: bytes) -> bool:
        """Process a message of a direct subscription. Return whether it is one."""
        receive = self._receivers.get(sid)
        if receive is None:
            return False
        try:
            receive(subject.decode(), data)
        except Exception as error:
            self._drop(error)
        return True

    def _drop(self, error: Exception) -> None:
        self._dropped.warning(
            "dropped a message that can't be parsed error=%s", type(error).__name__
        )

    def _is_log_record(self, sid: int, subject: bytes, reply: bytes) -> bool:
        """Return whether JetStream delivers it, which alone sends other subjects to an inbox."""
        subscription = self._subs.get(sid)
        return (
            subscription is not None
            and reply.startswith(b"$JS.ACK.")
            and subscription.subject.startswith(f"{self._access.inbox_prefix}.")
            and not subject.startswith(f"{self._access.inbox_prefix}.".encode())
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
        Require TLS for a `tls://` server, or with settings of TLS, before anything is sent.

        nats-py sends credentials in plaintext if the server does not require TLS:
        https://github.com/nats-io/nats.py/pull/912 corrects it in nats-core, not in nats-py.
        """
        server = self._current_server
        is_wanted = self._access.tls is not None or (server and server.uri.scheme == "tls")
        if initial_connection and is_wanted:
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
        self._pinged_at.append(time.monotonic())
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
        while len(self._pinged_at) > len(self._pongs):  # those of an earlier connection
            self._pinged_at.popleft()
        if self._pinged_at:
            self.confirmed_at = self._pinged_at.popleft()
        if self._pongs and self._pongs[0].done():
            del self._pongs[0]
            self._pings_outstanding = 0
        else:
            await super()._process_pong()


def _size_and_ttl(headers: bytes | None) -> bytes:
    """
    Return a header block with the size that the server added as the last line, if it did, and with
    the record's time to live.
    """
    if not (sizes := _MESSAGE_SIZE.findall(headers or b"")):
        return b""
    lines = [b"Nats-Msg-Size: " + sizes[-1]]
    lines += [b"Nats-TTL: " + ttl for ttl in _MESSAGE_TTL.findall(headers or b"")[:1]]
    return b"NATS/1.0\r\n%b\r\n\r\n" % b"\r\n".join(lines)


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
    """
    Log each connection error once in an outage: nats-py reports every failed attempt. What the
    server refuses for lack of permissions is logged at most once in ten seconds.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._logged: set[str] = set()
        self._refused = RateLimitedLog(log)

    async def on_error(self, error: Exception) -> None:
        text = _text(error)
        if parser.PERMISSIONS_ERR in text.lower():
            self._refused.warning(NOT_PERMITTED, self._servers, text)
        elif text not in self._logged:
            self._logged.add(text)
            advice = f" {_advice(error)};" if _advice(error) else ""
            log.warning("NATS at %s: %s;%s still trying", self._servers, text, advice)

    def on_connected(self) -> None:
        """Log errors of the next outage again."""
        self._logged.clear()


def _advice(error: Exception) -> str:
    """Return what to check if the server rejects this client for good, else ""."""
    if isinstance(error, ssl.SSLError):
        is_rejected = _REJECTED_CERTIFICATE.search(error.reason or "")
        return CHECK_CERTIFICATE if is_rejected else ""
    return CHECK_CREDENTIALS if _REJECTED_USER.search(str(error)) else ""


def _text(error: Exception) -> str:
    return str(error).removeprefix("nats: ").strip("'") or type(error).__name__
