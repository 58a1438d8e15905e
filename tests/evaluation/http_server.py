"""An HTTP server that sends scripted responses, in order."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

Response = tuple[int, dict[str, str], str]


def completion(text: str, finish_reason: str = "stop") -> Response:
    """Return a streamed answer, a character in each chunk."""
    chunks: list[Any] = [
        {"choices": [{"delta": {"content": each}, "finish_reason": None}]} for each in text
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": finish_reason}]})
    chunks.append({"choices": [], "usage": {"completion_tokens": len(text)}})
    return (
        200,
        {},
        "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n",
    )


def failure(status: int, message: str, **headers: str) -> Response:
    return status, headers, json.dumps({"error": {"message": message}})


class HttpServer:
    def __init__(self, responses: list[Response]) -> None:
        self._responses = responses
        self.url = ""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """The first lines, and the bodies."""
        self.authorizations: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((head.partition(" HTTP")[0], json.loads(body or b"{}")))
        self.authorizations.append(headers.get("authorization", ""))
        status, more, text = self._responses.pop(0)
        lines = [f"HTTP/1.1 {status} x", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        writer.write("\r\n".join([*lines, "", text]).encode())
        await writer.drain()
        writer.close()


@asynccontextmanager
async def http_server(*responses: Response) -> AsyncIterator[HttpServer]:
    server = HttpServer(list(responses))
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield server
