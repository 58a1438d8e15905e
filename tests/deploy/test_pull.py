"""`just pull`, from a server that speaks the Hub's HTTP."""

import os
import pty
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.deploy.hub import Hub, running_hub
from tests.servers import ROOT, free_port, wait_for

BIG = random.Random(1).randbytes(25 * 2**20)  # the library reads 10 MiB at once
REPOSITORY = {
    "README.md": b"text",
    "mmproj-F16.gguf": b"projector",
    "tiny-Q2_K.gguf": b"two",
    "tiny-Q4_K_M.gguf": b"four",
    "tiny-UD-Q4_K_M.gguf": b"other four",
    "tiny.imatrix.gguf": b"matrix",
    "Q8_0/tiny-Q8_0-00001-of-00002.gguf": b"eight, part one",
    "Q8_0/tiny-Q8_0-00002-of-00002.gguf": b"eight, part two",
    "F16/tiny-F16-00002-of-00002.gguf": b"the first part is missing",
}


class Folder:
    """A project's folder, in which `just pull` runs."""

    def __init__(self, path: Path, hub: Hub) -> None:
        self.path = path
        self.hub = hub
        for name in ("services", "deploy"):
            (path / name).symlink_to(ROOT / name)

    def start(
        self, *arguments: str, stdout: int = subprocess.PIPE, environ: Mapping[str, str] = {}
    ) -> "Popen":
        home = {"HF_HOME": str(self.path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.pull", *arguments],
            cwd=self.path,
            env=os.environ | {"HF_ENDPOINT": self.hub.url} | home | dict(environ),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pull(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        """Return exit code, output and errors."""
        process = self.start(*arguments, environ=environ)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def files(self) -> dict[str, bytes]:
        """Return the files in model/, hidden ones too."""
        return {file.name: file.read_bytes() for file in (self.path / "model").glob("*")}


Popen = subprocess.Popen[str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.files["ada/tiny-GGUF"] = REPOSITORY
        yield hub


@pytest.fixture
def folder(tmp_path: Path, hub: Hub) -> Folder:
    return Folder(tmp_path, hub)


def test_usual_quantization_is_the_default(folder: Folder, hub: Hub) -> None:
    code, out, err = folder.pull("ada/tiny-GGUF", HF_TOKEN="good")
    assert (code, err) == (0, "")
    assert folder.files() == {"tiny-Q4_K_M.gguf": b"four"}
    assert "tiny-Q4_K_M.gguf: 100% of 0.00 MB" in out
    assert "serve it: MODEL_PATH=model/tiny-Q4_K_M.gguf just up" in out
    assert hub.cdn_tokens == [None], "the token goes to the Hub only"


@pytest.mark.parametrize(
    ("quant", "content"),
    [
        ("q2_k", {"tiny-Q2_K.gguf": b"two"}),
        ("UD-Q4_K_M", {"tiny-UD-Q4_K_M.gguf": b"other four"}),
        ("tiny-Q2_K.gguf", {"tiny-Q2_K.gguf": b"two"}),
        (
            "Q8_0",
            {
                "tiny-Q8_0-00001-of-00002.gguf": b"eight, part one",
                "tiny-Q8_0-00002-of-00002.gguf": b"eight, part two",
            },
        ),
    ],
)
def test_named_quantization_is_downloaded_with_all_parts(
    folder: Folder, quant: str, content: dict[str, bytes]
) -> None:
    assert folder.pull(f"ada/tiny-GGUF:{quant}")[0] == 0
    assert folder.files() == content


def test_only_model_of_a_repository_is_the_default(folder: Folder, hub: Hub) -> None:
    hub.files["ada/one"] = {"mmproj.gguf": b"-", "mine.gguf": b"mine"}
    assert folder.pull("ada/one")[0] == 0
    assert folder.files() == {"mine.gguf": b"mine"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "ada/tiny-GGUF:Q5_0",
            "has no Q5_0. It has F16 (0.00 MB), Q8_0 (0.00 MB), Q2_K (0.00 MB), Q4_K_M",
        ),
        ("ada/tiny-GGUF:F16", "has 1 of 2 parts of F16: choose another quantization"),
        ("ada/nothing", "has no model ada/nothing, or it is private. Check the name"),
        ("ada/gated", "is gated: accept its conditions on http://127.0.0.1"),
        ("ada/empty", "contains no GGUF model"),
        ("not a name", "'not a name' is not the name of a repository"),
        ("a/b/c", "'a/b/c' is not the name of a repository"),
        ("", "usage: just pull"),
    ],
)
def test_failure_is_a_sentence(folder: Folder, hub: Hub, name: str, why: str) -> None:
    hub.files |= {"ada/gated": REPOSITORY, "ada/empty": {"model.safetensors": b"x"}}
    code, _, err = folder.pull(name)
    assert code in (1, 2) and why in err and "Traceback" not in err
    assert not (folder.path / "model").exists() or folder.files() == {}


@pytest.mark.parametrize(
    "path",
    [
        "../../up.gguf",
        "/up.gguf",
        "a/../up.gguf",
        "a\\..\\up.gguf",
        "zero\0.gguf",
        "red\x1b[31m.gguf",
        "two\nlines.gguf",
        "half\udc80.gguf",
        f"{'long' * 60}.gguf",
    ],
)
def test_repository_with_an_unsafe_path_is_refused(folder: Folder, hub: Hub, path: str) -> None:
    hub.files["ada/evil"] = {path: b"evil", "good-Q4_K_M.gguf": b"good"}
    code, _, err = folder.pull("ada/evil")
    assert code == 1 and "is not the path of a file that can be saved" in err, err
    assert hub.ranges == []


def test_hidden_files_are_no_models(folder: Folder, hub: Hub) -> None:
    hub.files["ada/mac"] = {"._tiny-Q4_K_M.gguf": b"written by macOS"}
    assert "contains no GGUF model" in folder.pull("ada/mac")[2]


def test_token_opens_a_gated_repository(folder: Folder, hub: Hub) -> None:
    hub.files["ada/gated"] = REPOSITORY
    assert folder.pull("ada/gated:Q2_K", HF_TOKEN="good")[0] == 0


def test_unreachable_hub_is_explained(folder: Folder) -> None:
    code, _, err = folder.pull("ada/tiny-GGUF", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert code == 1 and "can't be reached" in err and "Traceback" not in err


def test_lost_connection_is_resumed_at_once(folder: Folder, hub: Hub) -> None:
    hub.files["ada/big"] = {"big.gguf": BIG}
    hub.break_after = 15 * 2**20
    code, out, _ = folder.pull("ada/big")
    assert code == 0 and folder.files() == {"big.gguf": BIG}
    assert hub.ranges[0] == "" and hub.ranges[1].startswith("bytes=1")


def test_killed_download_is_resumed_by_the_next(folder: Folder, hub: Hub) -> None:
    hub.files["ada/big"] = {"big.gguf": BIG}
    hub.stall_after = 22 * 2**20
    process = folder.start("ada/big")
    wait_for(lambda: _part_bytes(folder) >= 20 * 2**20, "20 MiB")
    second = folder.pull("ada/big")
    assert second[0] == 1 and "Another `just pull` is downloading" in second[2]
    process.kill()
    process.communicate()
    have = _part_bytes(folder)
    hub.stall_after = None
    hub.released.set()
    assert folder.pull("ada/big")[0] == 0
    assert hub.ranges[-1] == f"bytes={have}-"
    assert folder.files() == {"big.gguf": BIG}


def test_changed_file_is_not_resumed(folder: Folder, hub: Hub) -> None:
    (folder.path / "model").mkdir()
    (folder.path / "model/.tiny-Q2_K.gguf.0123456789abcdef.part").write_bytes(b"xx")
    assert folder.pull("ada/tiny-GGUF:Q2_K")[0] == 0
    assert folder.files()["tiny-Q2_K.gguf"] == b"two"


def test_damaged_download_is_dropped(folder: Folder, hub: Hub) -> None:
    hub.damaged = True
    code, _, err = folder.pull("ada/tiny-GGUF")
    assert code == 1 and "damaged on its way (SHA-256 differs)" in err
    assert folder.files() == {}
    hub.damaged = False
    assert folder.pull("ada/tiny-GGUF")[0] == 0


def test_file_that_is_there_is_never_overwritten(folder: Folder, hub: Hub) -> None:
    assert folder.pull("ada/tiny-GGUF")[0] == 0
    code, out, _ = folder.pull("ada/tiny-GGUF")
    assert code == 0 and "is there already" in out and len(hub.ranges) == 1
    (folder.path / "model/tiny-Q4_K_M.gguf").write_bytes(b"mine")
    code, _, err = folder.pull("ada/tiny-GGUF")
    assert code == 1 and "exists, with other content: rename or remove it first" in err
    assert folder.files() == {"tiny-Q4_K_M.gguf": b"mine"}


def test_full_disk_is_explained_before_the_download(folder: Folder, hub: Hub) -> None:
    hub.files["ada/big"] = {"big.gguf": BIG}
    (folder.path / "sitecustomize.py").write_text(
        "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**7, 0, 10**7)\n"
    )
    code, _, err = folder.pull("ada/big", PYTHONPATH=str(folder.path))
    assert code == 1 and "has 0.01 GB of free space, and the download needs 0.03 GB" in err
    assert not hub.ranges


def test_terminal_shows_a_bar(folder: Folder) -> None:
    terminal, end = pty.openpty()
    process = folder.start("ada/tiny-GGUF", stdout=end)
    _, err = process.communicate(timeout=60)
    os.close(end)
    os.close(terminal)
    assert process.returncode == 0 and "100%|" in err


def _part_bytes(folder: Folder) -> int:
    return sum(part.stat().st_size for part in (folder.path / "model").glob(".*.part"))
