from pathlib import Path

import pytest

from services.inference import models
from services.inference.engine.llama import ModelError
from services.inference.settings import InferenceSettings


def load(path: Path) -> models.Model:
    return models.load(InferenceSettings(model_path=str(path)), lambda _: True)


def test_the_one_model_of_the_folder_is_taken_and_the_demo_model_if_there_is_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "demo.gguf").touch()
    assert models.find("", tmp_path).name == "demo.gguf"
    (tmp_path / "mine.gguf").touch()
    assert models.find("", tmp_path).name == "mine.gguf"
    assert models.find("elsewhere/other.gguf", tmp_path) == Path("elsewhere/other.gguf")


def test_two_models_and_no_choice_is_an_error_that_lists_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "demo.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"\(a\.gguf, b\.gguf\): name one with MODEL_PATH"):
        models.find("", tmp_path)


def test_the_demo_model_is_ready_to_serve() -> None:
    model = load(Path("model/demo.gguf"))
    assert (model.info.name, model.info.context) == ("demo", 2048)
    assert len(model.info.digest) == 64
    model.backend.close()


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read .*put a .gguf file into model/"):
        load(tmp_path / "none.gguf")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        load(tmp_path)


def test_a_file_of_another_kind_is_said_to_be_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4 a zip file")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load(path)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    key = b"tokenizer.chat_template"
    data = Path("model/demo.gguf").read_bytes()
    assert data.count(key) == 1
    path.write_bytes(data.replace(key, b"tokenizer.chat_temptate"))
    with pytest.raises(ModelError, match="carries no chat template"):
        load(path)
