"""Streamed responses of JSON Lines."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator

from litestar.response import Stream

from services.contract.errors import ServiceError
from services.edge.errors import AnyRequest

log = logging.getLogger(__name__)


def json_lines(
    request: AnyRequest, lines: AsyncIterator[bytes], headers: dict[str, str] | None = None
) -> Stream:
    """Return a response of these lines. An error breaks the connection, so the client notices."""
    content = () if request.method == "HEAD" else _log_errors(request, lines)
    return Stream(content, media_type="application/jsonl", headers=headers)


async def _log_errors(
    request: AnyRequest, lines: AsyncIterator[bytes]
) -> AsyncGenerator[bytes, None]:
    try:
        async for part in lines:
            yield part
    except ServiceError as error:
        request.state.error_code = error.code
        log.warning("response cut path=%s code=%s: %s", request.scope["path"], error.code, error)
        raise
