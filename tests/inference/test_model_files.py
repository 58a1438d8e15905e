"""Choice of the model file, and explanations of files that are not served."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest

from bench.embedding_models import write
from services.inference.engine.llama_model import ModelError
from services.inference.model_files import (
    check_files,
    find_adapters,
    find_model,
    kind_of,
    parts_of,
)
from services.inference.model_path import model_name
from tests.inference.gguf_files import DEMO, Value, write_header
from tests.inference.lora import write_lora

EMBEDDING: dict[str, Value] = {"general__architecture": "qwen3", "qwen3__pooling_type": 3}
RERANKER: dict[str, Value] = {"general__architecture": "bert", "bert__pooling_type": 4}
ENCODER: dict[str, Value] = {"general__architecture": "bert", "bert__attention__causal": False}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    "name",
    [
        "mine.gguf",
        "MINE.GGUF",
        "folder/mine.gguf",
        "models--me--mine/snapshots/1234/mine.Q4_K_M.gguf",
        "mine-00001-of-00001.gguf",
    ],
)
def test_only_model_of_a_folder_replaces_the_demo(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "demo.gguf")
    assert find_model("", tmp_path) == tmp_path / "demo.gguf"
    touch(tmp_path, name, "._mine.gguf", ".cache/other.gguf", "adapters/a.gguf", "README.md")
    assert find_model("", tmp_path) == tmp_path / name
    assert find_model(str(tmp_path), Path("elsewhere")) == tmp_path / name


def test_links_are_followed_and_broken_ones_explained(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/mine.gguf", "model/demo.gguf")
    (tmp_path / "model/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "model/again").symlink_to(tmp_path / "model")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    assert find_model("", tmp_path / "model") == tmp_path / "model/linked/mine.gguf"
    (tmp_path / "elsewhere/mine.gguf").unlink()
    (tmp_path / "model/mine.gguf").symlink_to(tmp_path / "elsewhere/mine.gguf")
    with pytest.raises(ModelError, match=r"mine\.gguf can't be read: No such file"):
        check_files([find_model("", tmp_path / "model")])


def test_model_path_may_begin_with_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "models/mine.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/models/mine.gguf", "~/models", str(tmp_path / "models/mine.gguf")):
        assert find_model(path, Path("elsewhere")) == tmp_path / "models/mine.gguf"


def test_model_path_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^Model file not found: MODEL_PATH=model/nope\.gguf\."):
        find_model("model/nope.gguf", tmp_path)
    for path in ("~nobody/x.gguf", "long" * 100):  # at which pathlib raises
        with pytest.raises(ModelError, match=r"^Model file not found: MODEL_PATH="):
            find_model(path, tmp_path)
    with pytest.raises(
        ModelError, match=r"contains no \.gguf file: put one there, or set MODEL_PATH"
    ):
        find_model(str(tmp_path), tmp_path)


def test_bundled_demo_is_served_if_nothing_else_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "package/demo.gguf")
    bundled, folder = tmp_path / "package/demo.gguf", tmp_path / "model"
    assert find_model("", folder, bundled) == bundled  # no folder at all
    assert "contains no .gguf file, so the demo model is served" in caplog.text
    with pytest.raises(ModelError, match=r"contains no \.gguf file"):
        find_model("", folder, tmp_path / "missing.gguf")
    touch(tmp_path, "model/config.json")
    assert find_model("", folder, bundled) == bundled
    with pytest.raises(ModelError, match=r"contains no \.gguf file"):
        find_model(str(folder), folder, bundled)
    touch(tmp_path, "model/mine.safetensors")
    with pytest.raises(ModelError, match=r"mine\.safetensors"):
        find_model("", folder, bundled)
    touch(tmp_path, "model/mine.gguf")
    assert find_model("", folder, bundled) == folder / "mine.gguf"


def test_several_models_without_model_path_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "b.gguf", "folder/a.GGUF", "demo.gguf", "c-00001-of-00001.gguf")
    names = r"\(b\.gguf, c-00001-of-00001\.gguf, folder/a\.GGUF\): choose one with MODEL_PATH"
    with pytest.raises(ModelError, match=names):
        find_model("", tmp_path)


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_any_part_of_a_split_model_names_the_model(tmp_path: Path, suffix: str) -> None:
    names = [f"mine-0000{number}-of-00003{suffix}" for number in (1, 2, 3)]
    touch(tmp_path, *names)
    assert find_model("", tmp_path).name == names[0]
    for name in names:
        path = find_model(str(tmp_path / name), Path("elsewhere"))
        assert [part.name for part in parts_of(path)] == names
        assert model_name(path) == "mine"


def test_missing_part_is_an_error_that_names_it(tmp_path: Path) -> None:
    touch(tmp_path, "mine-00002-of-00003.gguf")
    missing = r"one of 3 parts of a model, and mine-00001-of-00003\.gguf, mine-00003-of-00003\.gguf"
    for model_path in ("", str(tmp_path / "mine-00002-of-00003.gguf")):
        with pytest.raises(ModelError, match=missing):
            find_model(model_path, tmp_path)


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda folder: write_lora(folder / "x.gguf"), r"is a LoRA adapter: move it into .*adapt"),
        (lambda folder: touch(folder, "mmproj-x.gguf"), "is a projector for images"),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="clip"),
            "is a projector for images",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__type="imatrix"),
            "is an importance matrix",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="t5"),
            r"is an encoder-decoder model \(T5\)",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="llada"),
            "is a diffusion model, which is not supported",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="flux"),
            "is a model for images or videos",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="qwen3tts"),
            "is a model for audio",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="eagle3"),
            "is a draft model for speculative decoding",
        ),
        (
            lambda folder: write_header(folder / "x.gguf", general__architecture="llama"),
            "has a vocabulary but no weights",
        ),
    ],
)
def test_gguf_that_is_no_chat_model_is_explained(
    tmp_path: Path, write: Callable[[Path], object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "demo.gguf")
    write(tmp_path)
    (file,) = (file for file in tmp_path.iterdir() if file.name != "demo.gguf")
    for model_path in ("", str(file), str(tmp_path)):
        with pytest.raises(ModelError, match=why):
            find_model(model_path, tmp_path)
    touch(tmp_path, "mine.gguf")
    with caplog.at_level(logging.WARNING):
        assert find_model("", tmp_path).name == "mine.gguf"
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.safetensors", "is not a GGUF file: convert it with llama.cpp's convert_hf_to_gguf"),
        ("mine/model-00001-of-00002.safetensors", "is not a GGUF file: convert it"),
        ("pytorch_model.bin", "is not a GGUF file: convert it"),
        ("adapter_model.safetensors", "is a LoRA adapter: convert it with .*convert_lora_to_gguf"),
        ("mine.gguf.part", "is not a .gguf file: finish its download"),
    ],
)
def test_model_in_another_format_is_explained(
    tmp_path: Path, name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "demo.gguf", name, "config.json")
    with pytest.raises(ModelError, match=why):
        find_model("", tmp_path)
    touch(tmp_path, "mine.gguf")
    assert find_model("", tmp_path).name == "mine.gguf" and name in caplog.text


def test_damaged_header_is_left_to_the_loader(tmp_path: Path) -> None:
    whole = write_header(tmp_path / "mine.gguf", general__architecture="clip").read_bytes()
    for size in range(4, len(whole)):
        (tmp_path / "mine.gguf").write_bytes(whole[:size])
        assert find_model("", tmp_path).name == "mine.gguf"
        assert kind_of(tmp_path / "mine.gguf") == "chat"
    with pytest.raises(ModelError, match="is a projector"):
        (tmp_path / "mine.gguf").write_bytes(whole)
        find_model("", tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"mine\.gguf is empty: did its download fail\?"),
        (b"PK\3\4 a zip file", r"mine\.gguf is not a GGUF file: convert it"),
    ],
)
def test_file_that_is_no_gguf_is_explained(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "mine.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=why):
        check_files([DEMO, tmp_path / "mine.gguf"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_unreadable_file_is_explained() -> None:
    with TemporaryDirectory() as name:  # the folders above pytest's own are closed to others
        public = Path(name)
        public.chmod(0o755)
        touch(public, "mine.gguf", "folder/mine.gguf")
        (public / "mine.gguf").chmod(0o600)
        (public / "folder").chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(
                ModelError, match=r"can't be read by this user: run chmod o\+r .*mine\.gguf"
            ):
                check_files([public / "mine.gguf"])
            with pytest.raises(
                ModelError, match=r"folder can't be read .*: run chmod o\+rx .*folder"
            ):
                find_model("", public)
        finally:
            os.seteuid(0)


def test_adapters_come_from_model_folder_and_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(
        tmp_path / "model",
        "sub/mine-00001-of-00002.gguf",
        "sub/mine-00002-of-00002.gguf",
        "sub/adapters/a.gguf",
        "adapters/b.GGUF",
        "adapters/._b.gguf",
        "adapters/notes.txt",
        "adapters/mine/c.gguf",
        "adapters/mine/adapter_model.safetensors",
        "adapters/other/d.gguf",
    )
    found = find_adapters(find_model("", Path("model")))
    assert {name: file.name for name, file in found.files.items()} == {
        "a": "a.gguf",
        "b": "b.GGUF",
        "c": "c.gguf",
    }
    (fault,) = found.faults
    assert "adapter_model.safetensors is a LoRA adapter: convert it" in fault


def test_project_folder_serves_the_demo_model() -> None:
    assert find_model("", Path("model")) == DEMO


@pytest.mark.parametrize(
    ("architecture", "kind", "why"),
    [
        ("clip", "mmproj", "is a projector for images"),
        ("llama", "adapter", "is a LoRA adapter"),
        ("", "imatrix", "is an importance matrix"),
        ("dream", "model", "is a diffusion model"),
        ("t5encoder", "model", "is an encoder-decoder model"),
    ],
)
def test_file_written_by_gguf_is_explained(
    tmp_path: Path, architecture: str, kind: str, why: str
) -> None:
    """The gguf package is what llama.cpp's converters write with."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=why):
        find_model(str(path), tmp_path)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (EMBEDDING, "embedding"),
        (ENCODER, "embedding"),
        (RERANKER, "rerank"),
        ({"general__architecture": "qwen3", "qwen3__pooling_type": 0}, "chat"),
        ({"general__architecture": "qwen3", "bert__pooling_type": 4}, "chat"),
    ],
)
def test_file_says_what_its_model_is_for(
    tmp_path: Path, values: dict[str, Value], kind: str
) -> None:
    assert kind_of(write_header(tmp_path / "x.gguf", **values)) == kind
    assert kind_of(DEMO) == "chat"


def test_embedding_model_beside_a_chat_model_needs_a_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedding = write("bert", tmp_path / "b.gguf")
    assert find_model("", tmp_path) == embedding
    shutil.copy(DEMO, tmp_path / "mine.gguf")
    with caplog.at_level(logging.WARNING):
        assert find_model("", tmp_path).name == "mine.gguf"
    assert f"{embedding} can't chat: to serve it, too, add its path to MODEL_PATH" in caplog.text
    assert find_model(str(embedding), tmp_path) == embedding


def test_first_part_without_weights_is_a_model(tmp_path: Path) -> None:
    """llama.cpp's gguf-split can leave only the metadata in it (--no-tensor-first-split)."""
    write_header(tmp_path / "x-00001-of-00002.gguf", general__architecture="llama")
    touch(tmp_path, "x-00002-of-00002.gguf")
    assert find_model("", tmp_path).name == "x-00001-of-00002.gguf"


def test_blanks_and_a_comma_around_a_path_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf")
    assert find_model(f" {tmp_path}/a.gguf, ", tmp_path) == tmp_path / "a.gguf"


def test_several_models_are_for_several_workers(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf", "b.gguf")
    with pytest.raises(ModelError, match="names 2 models, and a worker serves one"):
        find_model(f"{tmp_path}/a.gguf,{tmp_path}/b.gguf", tmp_path)


def test_pipe_among_the_models_is_explained(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"x\.gguf is not a file: remove it"):
        check_files([find_model("", tmp_path)])


def test_missing_parts_are_named_in_a_short_sentence(tmp_path: Path) -> None:
    (tmp_path / "x-00001-of-99999.gguf").touch()
    with pytest.raises(ModelError, match="x-00002-of-99999.gguf, .* and 99,995 more are") as error:
        find_model(str(tmp_path), tmp_path)
    assert len(str(error.value)) < 400
