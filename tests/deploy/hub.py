"""A server that speaks the HTTP of the Hugging Face Hub, as far as downloads use it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK_BYTES = 2**20


@dataclass
class Hub:
    """
    `files` are the files of repositories, by `owner/name`. Names with `gated` need the token
    `good`. Files come from a second host name, as from the Hub's CDN.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    damaged: bool = False
    break_after: int | None = None  # bytes after which the next download loses its connection
    stall_after: int | None = None  # bytes after which downloads stall until `released`
    released: threading.Event = field(default_factory=threading.Event)
    ranges: list[str] = field(default_factory=list)  # of downloads; "" for a whole file
    cdn_tokens: list[str | None] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["cdn", owner, name, *path]:
                self._send_file(self.hub.files[f"{owner}/{name}"]["/".join(path)])
            case ["api", "models", owner, name, *rest] if self._is_allowed(f"{owner}/{name}"):
                repository = f"{owner}/{name}"
                is_tree = rest == ["tree", COMMIT]
                self._send_json(self._tree(repository) if is_tree else self._info(repository))
            case [owner, name, "resolve", revision, *path] if self._is_allowed(f"{owner}/{name}"):
                assert revision == COMMIT
                self._redirect(f"{owner}/{name}", "/".join(path))
            case _:
                self._send(b"{}", 404)

    def _is_allowed(self, repository: str) -> bool:
        """Refuse what the Hub refuses, with its status and error codes."""
        if repository not in self.hub.files:
            self._send(b"{}", 401, {"X-Error-Code": "RepoNotFound"})
            return False
        if "gated" in repository and self.headers["Authorization"] != "Bearer good":
            self._send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
            return False
        return True

    def _info(self, repository: str) -> object:
        return {"id": repository, "sha": COMMIT, "private": False, "siblings": [], "tags": []}

    def _tree(self, repository: str) -> object:
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": "1" * 40,
                "lfs": {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 134,
                },
            }
            for path, content in self.hub.files[repository].items()
        ] + [{"type": "directory", "path": "folder", "oid": "2" * 40}]

    def _redirect(self, repository: str, path: str) -> None:
        content = self.hub.files[repository][path]
        location = f"http://localhost:{self.hub.port}/cdn/{repository}/{path}"
        digest = hashlib.sha256(content).hexdigest()
        headers = {"Location": location, "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"'}
        self._send(b"", 302, headers | {"X-Linked-Size": str(len(content))})

    def _send_file(self, content: bytes) -> None:
        hub = self.hub
        hub.ranges.append(self.headers.get("Range", ""))
        hub.cdn_tokens.append(self.headers["Authorization"])
        start = int(hub.ranges[-1].removeprefix("bytes=").split("-")[0] or 0)
        body = bytearray(content[start:])
        if hub.damaged:
            body[-1] ^= 1
        size = len(content)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        self._send_slowly(bytes(body))

    def _send_slowly(self, body: bytes) -> None:
        break_after, self.hub.break_after = self.hub.break_after, None
        for at in range(0, len(body), CHUNK_BYTES):
            if break_after is not None and at >= break_after:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if self.hub.stall_after is not None and at >= self.hub.stall_after:
                self.hub.released.wait(30)
            self.wfile.write(body[at : at + CHUNK_BYTES])

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
