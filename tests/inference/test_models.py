import shutil
from pathlib import Path

import pytest

from services.contract.errors import ServiceError
from services.inference import models
from services.inference.engine.llama import ModelError
from services.inference.settings import InferenceSettings
from tests.inference.lora import write_lora


def beside_the_demo_model(folder: Path, *adapters: str) -> Path:
    """A copy of the demo model with adapters of these names."""
    for seed, name in enumerate(adapters):
        write_lora(folder / f"adapters/{name}.gguf", seed)
    shutil.copy("model/demo.gguf", folder)
    return folder / "demo.gguf"


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
    assert model.info.adapters == ("pirate",)
    assert len(model.info.digest) == 64
    model.backend.close()


def test_the_adapters_beside_the_model_are_served_by_name(tmp_path: Path) -> None:
    path = beside_the_demo_model(tmp_path, "shout", "a.b c")
    (tmp_path / "adapters/notes.txt").touch()
    model = load(path)
    assert model.info.adapters == ("a.b c", "shout")
    assert [info.name for info in model.served] == ["demo", "demo:a.b c", "demo:shout"]
    assert len({info.digest for info in model.served}) == 3
    for name, adapter in ((None, 0), ("demo", 0), ("demo:a.b c", 1), ("demo:shout", 2)):
        assert model.adapter(name) == adapter
    model.backend.close()


def test_the_adapters_in_a_model_s_own_folder_are_served_with_it_alone(tmp_path: Path) -> None:
    path = beside_the_demo_model(tmp_path, "shout", "demo/pirate", "other/knight")
    model = load(path)
    assert model.info.adapters == ("pirate", "shout")
    model.backend.close()
    model = load(path.rename(tmp_path / "mine.gguf"))
    assert model.info.adapters == ("shout",)
    model.backend.close()


def test_two_adapters_of_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = beside_the_demo_model(tmp_path, "shout", "demo/shout")
    with pytest.raises(ModelError, match=r"shout\.gguf and .*shout\.gguf have the same name"):
        load(path)


def test_what_is_not_served_is_refused_with_what_is(tmp_path: Path) -> None:
    model = load(beside_the_demo_model(tmp_path, "shout"))
    for name in ("other", "shout", "demo:", "demo:shout:shout", "other:shout", "DEMO"):
        with pytest.raises(ServiceError, match="there is demo, demo:shout") as error:
            model.adapter(name)
        assert error.value.code == "model_not_found"
    model.backend.close()


def test_an_adapter_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = beside_the_demo_model(tmp_path, "good")
    write_lora(tmp_path / "adapters/narrow.gguf", width=64)
    with pytest.raises(ModelError, match=r"adapters/narrow\.gguf is no adapter of this model"):
        load(path)


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
