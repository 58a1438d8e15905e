"""gzip for responses, except where it would do harm."""

import re

from litestar.config.compression import CompressionConfig
from litestar.datastructures import Headers
from litestar.middleware.compression import CompressionMiddleware
from litestar.types import HTTPResponseStartEvent, Message, Scope, Send

_GZIP_REFUSED = re.compile(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)", re.IGNORECASE)


class Compression(CompressionMiddleware):
    """
    Litestar's compression, except for streams, whose headers and pings it would delay, and for a
    client that sends `gzip;q=0`, which Litestar ignores.
    """

    def create_compression_send_wrapper(
        self, send: Send, compression_encoding: str, scope: Scope
    ) -> Send:
        if not accepts_gzip(Headers.from_scope(scope)):
            return send
        chosen = super().create_compression_send_wrapper(send, compression_encoding, scope)

        async def send_chosen(message: Message) -> None:
            nonlocal chosen
            if message["type"] == "http.response.start" and _is_stream(message):
                chosen = send
            await chosen(message)

        return send_chosen


def accepts_gzip(headers: Headers) -> bool:
    given = headers.get("accept-encoding", "")
    return "gzip" in given and not _GZIP_REFUSED.search(given)


def _is_stream(start: HTTPResponseStartEvent) -> bool:
    return b"content-length" not in dict(start["headers"])


COMPRESSION = CompressionConfig(
    "gzip",
    minimum_size=1024,
    gzip_compress_level=4,  # a MiB takes 20 ms
    exclude=[
        "^/v1/embeddings",  # random bits: slow to compress, and hardly smaller
        "^/$",
        "^/page/",  # compressed when they were read
    ],
    middleware_class=Compression,
)
