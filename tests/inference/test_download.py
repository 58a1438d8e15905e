"""Models are downloaded from a real HTTP server that breaks off, redirects and refuses."""

import hashlib
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.inference.download import DownloadError, DownloadLimits, download, main

DATA = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(DATA).hexdigest()
FAST = DownloadLimits(tries=3, pause_seconds=0.01)


class Hub(ThreadingHTTPServer):
    """Serves DATA at /model. `script` has what happens to each request, first of all."""

    def __init__(self, *script: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.seen: list[tuple[str, str, str]] = []  # path, Range, Authorization

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        sent = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        self.server.seen.append((self.path, *sent))
        step = self.server.script.pop(0) if self.server.script else "serve"
        if step.isdigit():
            self.send_error(int(step))
        elif step.startswith("http"):
            self.send_response(302)
            self.send_header("Location", step)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._serve(DATA if step != "other" else DATA[::-1], step)

    def _serve(self, data: bytes, step: str) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if step == "whole":
            start = 0
        if start >= len(data):
            self.send_error(416)
            return
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if step == "break" else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(*script: str) -> Iterator[Hub]:
    with Hub(*script) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def test_file_is_downloaded_once(tmp_path: Path) -> None:
    path = tmp_path / "sub/model.gguf"
    with serving() as hub:
        download(f"{hub.url}/model", path, SHA256, limits=FAST)
        download(f"{hub.url}/model", path, SHA256, limits=FAST)
        assert hub.seen == [("/model", "", "")]
    assert path.read_bytes() == DATA and [each.name for each in path.parent.iterdir()] == [
        "model.gguf"
    ]


def test_broken_download_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    half = len(DATA) // 2
    with serving("break", "503", "serve") as hub:
        download(hub.url, path, SHA256, limits=FAST)
        assert [seen[1] for seen in hub.seen] == ["", f"bytes={half}-", f"bytes={half}-"]
    assert path.read_bytes() == DATA


def test_tries_that_get_further_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with serving(*["break"] * 6) as hub:
        download(hub.url, path, SHA256, limits=FAST)
        assert len(hub.seen) == 7
    assert path.read_bytes() == DATA


def test_server_without_ranges_sends_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with serving("break", "whole") as hub:
        download(hub.url, path, SHA256, limits=FAST)
    assert path.read_bytes() == DATA


def test_full_disk_is_named_at_once(tmp_path: Path, small_files: None) -> None:
    with serving() as hub:
        with pytest.raises(DownloadError, match=f"{tmp_path} has no room .* larger volume"):
            download(hub.url, tmp_path / "model.gguf", SHA256, limits=FAST)
        assert len(hub.seen) == 1


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond a part of DATA, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_complete_part_of_an_earlier_run_is_used(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.with_name("model.gguf.part").write_bytes(DATA)
    with serving() as hub:
        download(hub.url, path, SHA256, limits=FAST)
        assert [seen[1] for seen in hub.seen] == [f"bytes={len(DATA)}-"]
    assert path.read_bytes() == DATA


def test_another_file_is_refused_and_removed(tmp_path: Path) -> None:
    with serving("other") as hub, pytest.raises(DownloadError, match="it is another file"):
        download(hub.url, tmp_path / "model.gguf", SHA256, limits=FAST)
    assert list(tmp_path.iterdir()) == []


def test_changed_file_is_downloaded_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an older version")
    with serving() as hub:
        download(hub.url, path, SHA256, limits=FAST)
    assert path.read_bytes() == DATA


def test_token_is_not_sent_to_where_the_hub_redirects(tmp_path: Path) -> None:
    with serving() as store, serving(f"{store.url}/stored") as hub:
        download(f"{hub.url}/model", tmp_path / "model.gguf", SHA256, "secret", FAST)
        assert hub.seen == [("/model", "", "Bearer secret")]
        assert store.seen == [("/stored", "", "")]


@pytest.mark.parametrize("status", ["401", "404"])
def test_refusal_is_not_retried(tmp_path: Path, status: str) -> None:
    with serving(status) as hub:
        with pytest.raises(DownloadError, match=f"answers {status} .*: check the URL"):
            download(hub.url, tmp_path / "model.gguf", SHA256, limits=FAST)
        assert len(hub.seen) == 1


def test_dead_server_is_given_up(tmp_path: Path) -> None:
    with serving() as hub:
        url = hub.url
    with pytest.raises(DownloadError, match="can't be downloaded: .*refused.*Check the network"):
        download(url, tmp_path / "model.gguf", SHA256, limits=FAST)


def test_program_reads_the_token_from_its_file(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with serving("serve", "404") as hub:
        path = str(tmp_path / "model.gguf")
        assert main([hub.url, path, SHA256, str(token)]) is None
        assert hub.seen[0][2] == "Bearer secret"
        assert "answers 404" in str(main([hub.url, f"{path}2", SHA256]))
    assert "No such file" in str(main([hub.url, path, SHA256, str(tmp_path / "no")]))
