"""The folder of adapters, followed by a real engine with a fake backend."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo
from services.inference import adapters
from services.inference.adapters import AdapterFolder, Adapters
from services.inference.engine.adapter_numbers import BASE, file_of, scale_of
from services.inference.engine.engine import Engine
from tests.inference.fake_backend import FakeBackend

BASE_INFO = ModelInfo("mine", "digest", 1000, 1)


class Followed:
    """A model's folder and what the engine has of it. `step` is a look at the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "adapters"
        self.backend = FakeBackend({})
        self.engine = Engine(self.backend, 1, 0, lambda _: None, lambda: None)
        self.adapters = Adapters(BASE_INFO, self.engine.free_adapter)
        self.changes = 0
        self._loop = AdapterFolder(
            folder / "mine.gguf", self.adapters, self.engine, 0.0, self._on_change
        )
        self.folder.mkdir()

    @property
    def faults(self) -> tuple[str, ...]:
        return self._loop.faults

    def write(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    async def step(self, looks: int = 1) -> tuple[str, ...]:
        """Look, and return the names that requests can use then."""
        for _ in range(looks):
            await self._loop.step()
        return self.adapters.names

    def _on_change(self) -> None:
        self.changes += 1


@pytest.fixture
async def followed(tmp_path: Path) -> AsyncIterator[Followed]:
    followed = Followed(tmp_path)
    followed.engine.start()
    yield followed
    followed.engine.close()


async def test_first_look_loads_at_once(followed: Followed) -> None:
    followed.write("a.gguf", "1")
    followed.write("mine/b.gguf", "1")
    followed.write("other/c.gguf", "1")
    assert await followed.step() == ("a", "b")
    assert followed.changes == 1
    assert await followed.step(3) == ("a", "b") and followed.changes == 1


async def test_new_file_is_loaded_once_it_stays_as_it_is(followed: Followed) -> None:
    await followed.step()
    path = followed.write("a.gguf", "1")
    for part in "234":
        assert await followed.step() == ()
        with path.open("a") as file:
            file.write(part)
    assert await followed.step() == ()
    assert await followed.step() == ("a",)
    assert followed.backend.loaded == [1]


async def test_replaced_file_has_another_number_and_digest(followed: Followed) -> None:
    followed.write("a.gguf", "one")
    await followed.step()
    before = followed.adapters.find("mine:a")
    followed.write("a.gguf", "two")
    assert await followed.step(2) == ("a",)
    after = followed.adapters.find("mine:a")
    assert (file_of(before.number), file_of(after.number)) == (1, 2)
    assert before.info.digest != after.info.digest
    assert not followed.adapters.is_loaded(before) and followed.adapters.is_loaded(after)


async def test_touched_file_keeps_its_number(followed: Followed) -> None:
    path = followed.write("a.gguf", "one")
    await followed.step()
    os.utime(path, (1, 1))
    await followed.step(2)
    assert followed.backend.loaded == [1] and followed.adapters.names == ("a",)


async def test_same_content_that_returns_has_the_same_digest(followed: Followed) -> None:
    digests = []
    for content in ("one", "two", "one"):
        followed.write("a.gguf", content)
        await followed.step(2)
        digests.append(followed.adapters.find("mine:a").info.digest)
    assert digests[0] == digests[2] != digests[1]
    assert followed.backend.loaded == [1, 2, 3]


async def test_removed_adapter_is_freed_once_its_answers_end(followed: Followed) -> None:
    path = followed.write("a.gguf", "one")
    await followed.step()
    variant = followed.adapters.find("mine:a@0.5")
    followed.adapters.lease(variant)
    followed.adapters.lease(variant)
    path.unlink()
    assert await followed.step(2) == ()
    with pytest.raises(ServiceError, match=r"no model 'mine:a'; available: mine\.") as error:
        followed.adapters.find("mine:a")
    assert error.value.code == "model_not_found"
    followed.adapters.release(variant)
    assert followed.adapters.is_loaded(variant)
    followed.adapters.release(variant)
    assert not followed.adapters.is_loaded(variant)
    followed.engine.close()
    assert followed.backend.freed == [1]


async def test_file_that_is_gone_for_one_look_stays(followed: Followed) -> None:
    path = followed.write("a.gguf", "one")
    await followed.step()
    path.rename(path.with_suffix(".away"))
    assert await followed.step() == ("a",)
    path.with_suffix(".away").rename(path)
    assert await followed.step(2) == ("a",)
    assert followed.backend.loaded == [1]


async def test_broken_replacement_leaves_the_version_before(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    followed.write("a.gguf", "one")
    await followed.step()
    before = followed.adapters.find("mine:a")
    path = followed.write("a.gguf", "bad")
    with caplog.at_level(logging.WARNING):
        assert await followed.step(4) == ("a",)
    assert followed.adapters.find("mine:a") == before
    assert followed.faults == (f"{path} is bad.",)
    assert [record.getMessage() for record in caplog.records] == [f"{path} is bad."]
    followed.write("a.gguf", "three")
    await followed.step(2)
    assert not followed.faults
    assert followed.adapters.find("mine:a") != before


async def test_nonsense_is_explained_and_the_rest_is_loaded(followed: Followed) -> None:
    followed.write("good.gguf", "1")
    followed.write("mine/good.gguf", "2")
    followed.write("broken.gguf", "bad")
    followed.write("adapter_model.safetensors", "")
    (followed.folder / "folder.gguf").mkdir()
    os.mkfifo(followed.folder / "pipe.gguf")
    (followed.folder / "dangling.gguf").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(followed.folder) + b"/\xff.gguf")).touch()
    Path(os.fsdecode(os.fsencode(followed.folder) + b"/mine/\xff.safetensors")).touch()
    followed.write(".hidden.gguf", "bad")
    assert await followed.step(2) == ("good",)
    whole = "\n".join(followed.faults)
    assert whole.encode(), "reports are UTF-8"
    for why in (
        "good.gguf have the same name: rename one of them",
        "broken.gguf is bad",
        "folder.gguf is not a file",
        "pipe.gguf is not a file",
        "dangling.gguf is not a file",
        "is not valid UTF-8: rename it",
        "convert it with llama.cpp's convert_lora_to_gguf.py",
    ):
        assert why in whole, why
    assert "hidden" not in whole


async def test_file_that_could_not_be_read_is_tried_again(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [followed.write(name, name) for name in ("a.gguf", "b.gguf")]
    with monkeypatch.context() as patched:  # chmod keeps nothing from root
        patched.setattr(adapters, "_digest", Mock(side_effect=PermissionError(13, "denied")))
        assert await followed.step(3) == ()
    assert followed.faults == tuple(f"{path} can't be read: denied." for path in paths)
    paths[0].unlink()
    assert await followed.step(2) == ("b",)
    assert followed.faults == ()


async def test_load_that_kills_the_engine_raises(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed.backend, "load_adapter", Mock(side_effect=ValueError("a bug")))
    followed.write("a.gguf", "one")
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(followed.step(), 30)


async def test_folder_that_vanishes_and_returns_is_followed(followed: Followed) -> None:
    followed.write("a.gguf", "one")
    await followed.step()
    followed.folder.rename(followed.folder.with_name("away"))
    assert await followed.step(2) == ()
    followed.folder.with_name("away").rename(followed.folder)
    assert await followed.step(2) == ("a",)


@pytest.mark.parametrize(
    ("name", "full", "scale"),
    [
        ("mine:a", "mine:a", 1.0),
        ("mine:a@1", "mine:a", 1.0),
        ("mine:a@1.00", "mine:a", 1.0),
        ("mine:a@0.5", "mine:a@0.5", 0.5),
        ("mine:a@0.50", "mine:a@0.5", 0.5),
        ("mine:a@0", "mine:a@0", 0.0),
        ("mine:a@2", "mine:a@2", 2.0),
        ("mine:b@2", "mine:b@2", 1.0),
        ("mine:b@2@0.25", "mine:b@2@0.25", 0.25),
    ],
)
async def test_scale_is_part_of_the_name(
    followed: Followed, name: str, full: str, scale: float
) -> None:
    followed.write("a.gguf", "one")
    followed.write("b@2.gguf", "two")
    await followed.step()
    variant = followed.adapters.find(name)
    assert (variant.info.name, scale_of(variant.number)) == (full, scale)
    assert (variant.info.digest == followed.adapters.find("mine:a").info.digest) == (
        full == "mine:a"
    )


@pytest.mark.parametrize("scale", ["", "x", "-1", "2.01", "9", "0.123", "nan", "1e0", " 1", "٣"])
async def test_invalid_scale_is_an_invalid_request(followed: Followed, scale: str) -> None:
    followed.write("a.gguf", "one")
    await followed.step()
    with pytest.raises(ServiceError, match=r"from 0 to 2 .* mine:a@0\.5\.") as error:
        followed.adapters.find(f"mine:a@{scale}")
    assert error.value.code == "invalid_request"


async def test_scale_of_the_plain_model_is_unknown(followed: Followed) -> None:
    for name in ("mine@0.5", "mine:b@0.5", "@0.5", "mine:@1"):
        with pytest.raises(ServiceError, match="There is no model") as error:
            followed.adapters.find(name)
        assert error.value.code == "model_not_found"
    assert followed.adapters.find("mine").number == BASE


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "mine:../x", "mine:sub/../x", "mine:/x@0.5", "mine:x.gguf", "mine:x\0"],
)
async def test_name_in_a_request_is_compared_and_never_opened(
    followed: Followed, name: str
) -> None:
    followed.write("x.gguf", "1")
    followed.write("../x.gguf", "1")
    assert await followed.step() == ("x",)
    with pytest.raises(ServiceError) as error:
        followed.adapters.find(name)
    assert error.value.code == "model_not_found"
    assert followed.adapters.find("mine:x").info.name == "mine:x"


async def test_name_of_a_file_does_not_write_lines_into_the_log(followed: Followed) -> None:
    (followed.folder / "a\nforged \x1b[31m.gguf").mkdir()
    await followed.step()
    (fault,) = followed.faults
    assert "is not a file" in fault and fault.isprintable()
