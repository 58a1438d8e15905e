import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deploy import dataset
from deploy.dataset import DatasetError

LINES = [
    json.dumps({"session_id": f"s{n % 50}", "n": n}).encode() + b"\n"
    for n in range(500)
]  # fmt: skip


class ScriptedEdge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200
    is_cut = False
    lines = LINES
    asked: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = (
            b'{"error": {"message": "No such key."}}'
            if self.status != 200
            else b"".join(self.lines)
        )
        for start in range(0, len(body), 1000):
            part = body[start : start + 1000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        if not self.is_cut:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def edge() -> Iterator[Callable[..., str]]:
    """Start an edge that sends LINES; its attributes are given."""
    servers: list[HTTPServer] = []

    def start(**attributes: Any) -> str:
        kind = type("Edge", (ScriptedEdge,), attributes)
        servers.append(HTTPServer(("127.0.0.1", 0), kind))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sessions_in(path: Path) -> set[str]:
    return {json.loads(line)["session_id"] for line in path.read_bytes().splitlines()}


def test_split_puts_no_session_into_both_files(tmp_path: Path) -> None:
    counts = dataset.write(iter(LINES), tmp_path, seed=0, share=0.2)
    train, validation = (sessions_in(tmp_path / f"{name}.jsonl") for name in dataset.NAMES)
    assert not train & validation and len(train | validation) == 50
    assert counts["train"] + counts["validation"] == 500
    assert 3 <= len(validation) <= 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "validation.jsonl"]


def test_split_depends_on_seed_and_session_alone(tmp_path: Path) -> None:
    def validated(lines: list[bytes], seed: int) -> set[str]:
        dataset.write(iter(lines), tmp_path, seed, 0.5)
        return sessions_in(tmp_path / "validation.jsonl")

    first = validated(LINES, 1)
    assert validated(LINES[::-1], 1) == first
    assert validated(LINES[:25], 1) == {each for each in first if int(each[1:]) < 25}
    assert validated(LINES, 2) != first


@pytest.mark.parametrize(("share", "empty"), [(0.0, "validation"), (1.0, "train")])
def test_share_may_leave_a_file_empty(tmp_path: Path, share: float, empty: str) -> None:
    assert dataset.write(iter(LINES), tmp_path, 0, share)[empty] == 0
    assert (tmp_path / f"{empty}.jsonl").read_bytes() == b""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset", *map(str, arguments)])
    dataset.main()


def test_command_sends_filters_and_key(
    edge: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setenv("API_KEY", "secret")
    url = edge(asked=asked)
    options = ("--url", url, "--rating", "up", "--session-id", "a b", "--validation", 0.2)
    run(monkeypatch, "sft", "--out", tmp_path / "new" / "data", *options)
    assert asked == [("/datasets/sft?session_id=a+b&rating=up", "Bearer secret")]
    assert "train.jsonl: 380 lines" in capsys.readouterr().out


def test_cut_dataset_leaves_older_files(
    edge: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"older\n")
    with pytest.raises(SystemExit, match="Nothing was written"):
        run(monkeypatch, "preferences", "--out", tmp_path, "--url", edge(is_cut=True))
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_bytes() == b"older\n"


def test_error_of_the_edge_is_shown(edge: Callable[..., str]) -> None:
    with pytest.raises(DatasetError, match=r"No such key\. Set API_KEY to one\."):
        list(dataset.read_lines(edge(status=401), ""))


@pytest.mark.parametrize("url", ["127.0.0.1:9", "localhost:9", "http://x:y", "http://a b"])
def test_invalid_url_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    with pytest.raises(SystemExit, match="can't be read"):
        run(monkeypatch, "sft", "--out", tmp_path, "--url", url)


def test_invalid_key_is_explained_without_it(edge: Callable[..., str]) -> None:
    with pytest.raises(DatasetError, match="API_KEY") as caught:
        list(dataset.read_lines(edge(), "secret\nkey"))
    assert "secret" not in str(caught.value)


def test_page_that_is_no_dataset_is_an_error(
    edge: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lines in ([b"<html>\n"], [b"[]\n"], [b"{}\n"]):
        with pytest.raises(SystemExit, match="Is that an edge"):
            run(monkeypatch, "sft", "--out", tmp_path, "--url", edge(lines=lines))
        assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file_is_explained(
    edge: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="can't be written"):
        run(monkeypatch, "sft", "--out", tmp_path / "file", "--url", edge())


def test_absent_edge_is_an_error(edge: Callable[..., str]) -> None:
    with pytest.raises(DatasetError, match="can't be read"):
        list(dataset.read_lines("http://127.0.0.1:9/datasets/sft", ""))
