"""Loading of the model with its adapters and chat template."""

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.contract.messages import Sampling
from services.inference import models
from services.inference.engine import memory
from services.inference.engine.backend import Chunk, SampledToken
from services.inference.engine.llama_model import ModelError
from services.inference.settings import InferenceSettings
from tests.inference.gguf_files import DEMO, changed_demo, split_demo, without_template


def load(path: Path, template: str = "") -> models.LoadedModel:
    settings = InferenceSettings(
        model_path=str(path), model_chat_template=template, model_threads=1
    )
    return models.load_chat_model(settings, lambda _: True)


def first_tokens(model: models.LoadedModel) -> list[int]:
    """Return the first eight tokens of a greedy answer."""
    sampler = model.backend.sampler(Sampling(temperature=0))
    tokens = model.template.session_prompt("", (), "Who are you?", 10).tokens
    answer: list[int] = []
    while len(answer) < 8:
        chunk = Chunk(0, model.backend.length(0), tokens, sampler)
        (choice,) = model.backend.decode([chunk])
        assert isinstance(choice, SampledToken)
        answer.append(choice.token)
        tokens = answer[-1:]
    model.backend.truncate(0, 0)
    sampler.close()
    return answer


def test_demo_model_is_loaded_with_its_description() -> None:
    model = load(Path("model/demo.gguf"))
    assert (model.info.name, model.info.context) == ("demo", 2048)
    assert len(model.info.digest) == 64
    model.backend.close()


def test_split_model_has_a_digest_of_all_parts(tmp_path: Path) -> None:
    parts = split_demo(tmp_path / "mine.gguf")
    assert [part.name[:10] for part in parts] == ["mine-00001", "mine-00002"]
    model = load(parts[1])
    info = model.info
    assert (info.name, info.bytes) == ("mine", sum(part.stat().st_size for part in parts))
    assert first_tokens(model) == first_tokens(demo := load(DEMO))
    model.backend.close()
    demo.backend.close()
    with parts[1].open("ab") as file:
        file.write(b"x")
    model = load(tmp_path)
    assert model.info.digest != info.digest
    model.backend.close()


def test_parts_with_an_uppercase_suffix_are_loaded(tmp_path: Path) -> None:
    for part in split_demo(tmp_path / "mine.gguf"):
        part.rename(part.with_suffix(".GGUF"))
    model = load(tmp_path)
    assert model.info.name == "mine"
    model.backend.close()


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("size", "why"), [(-1000, "is incomplete"), (100, "is damaged or incomplete"), (0, "is empty")]
)
def test_truncated_part_is_named(tmp_path: Path, part: int, size: int, why: str) -> None:
    file = split_demo(tmp_path / "mine.gguf")[part]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=rf"mine-0000{part + 1}-of-00002\.gguf {why}"):
        load(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    for size, why in (
        (1000, r"damaged or incomplete \(it ends within its header\)"),
        (-1000, "incomplete"),
    ):
        path.write_bytes(DEMO.read_bytes()[:size])
        with pytest.raises(ModelError, match=rf"mine\.gguf is {why}: download or copy it again"):
            load(path)


def test_part_with_another_number_is_an_error(tmp_path: Path) -> None:
    first, second = split_demo(tmp_path / "mine.gguf")
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf is part 1 of 2 .* not 2 of 2: put"):
        load(tmp_path)


def test_part_of_a_model_with_other_parts_is_an_error(tmp_path: Path) -> None:
    first, second = split_demo(tmp_path / "mine.gguf")
    (tmp_path / "other").mkdir()
    _, other, _ = split_demo(tmp_path / "other/other.gguf", tensors=20)
    shutil.move(other, second)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf is part 2 of 3 .* not 2 of 2: put"):
        load(first)


def test_model_named_as_a_part_is_an_error(tmp_path: Path) -> None:
    _, second = split_demo(tmp_path / "mine.gguf")
    shutil.copy(DEMO, second)
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf is not a part of a split model"):
        load(tmp_path)


def test_part_without_its_number_is_an_error(tmp_path: Path) -> None:
    first, second = split_demo(tmp_path / "mine.gguf")
    first.rename(tmp_path / "mine.gguf")
    second.unlink()
    with pytest.raises(ModelError, match=r"mine\.gguf is part 1 of 2 by its metadata, not 1 of 1"):
        load(tmp_path)


def test_parts_of_two_models_are_an_error(tmp_path: Path) -> None:
    """Their numbers are right, but tensors of the first occur again in the second."""
    first, second = split_demo(tmp_path / "mine.gguf", tensors=30)
    (tmp_path / "other").mkdir()
    _, other = split_demo(tmp_path / "other/other.gguf", tensors=40)
    shutil.move(other, second)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ModelError, match=r"The parts of .*mine-00001.* are not of one model: down"):
        load(first)


def test_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(DEMO.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0llomo"))
    with pytest.raises(ModelError, match=r"architecture 'llomo', which this version of llama\.cpp"):
        load(path)


def test_damaged_model_is_an_error_before_it_is_loaded(tmp_path: Path) -> None:
    path = changed_demo(tmp_path / "mine.gguf", llama__block_count=0)
    with pytest.raises(ModelError, match=r"mine\.gguf is damaged, or llama\.cpp does not support"):
        load(path)


def test_context_is_chosen_from_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = changed_demo(tmp_path / "long.gguf", llama__context_length=3000)
    with caplog.at_level(logging.INFO):
        model = load(path)
    model.backend.close()
    assert model.info.context == 3000
    assert "context chosen tokens=3000 limit=model host_need_mib=" in caplog.text


def test_context_of_the_settings_wins(tmp_path: Path) -> None:
    path = changed_demo(tmp_path / "long.gguf", llama__context_length=3000)
    for wanted, context in ((200, 200), (5000, 3000)):
        settings = InferenceSettings(model_path=str(path), model_context=wanted, model_threads=1)
        model = models.load_chat_model(settings, lambda _: True)
        model.backend.close()
        assert model.info.context == context


@pytest.mark.parametrize(("free_mib", "bound_mib"), [(64_000, 4096), (2000, 2000 - 300 - 125)])
def test_host_cache_is_bounded_by_the_memory(
    free_mib: int, bound_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model and its context take 125 MiB."""
    monkeypatch.setattr(memory, "measure", lambda: memory.Memory(free_mib * 2**20))
    model = load(DEMO)
    model.backend.close()
    assert model.max_host_cache / 2**20 == pytest.approx(bound_mib, abs=10)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_main_gpu": 999}, "MODEL_MAIN_GPU=999 does not exist: llama.cpp sees"),
        ({"model_tensor_split": (1.0,) * 16}, "MODEL_TENSOR_SPLIT has 16 shares, but llama.cpp"),
        ({"model_main_gpu": 0, "model_tensor_split": (1.0,)}, "set only one of them"),
    ],
)
def test_gpus_that_do_not_exist_are_an_error(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        models.load(InferenceSettings(model_path=str(DEMO), **settings), lambda _: True)


def test_overwriting_a_served_file_changes_nothing(tmp_path: Path) -> None:
    path = Path(shutil.copy(DEMO, tmp_path / "mine.gguf"))
    model = load(path)
    before = first_tokens(model)
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))
    assert first_tokens(model) == before
    path.write_bytes(b"")  # a mapped file would cause a SIGBUS
    assert first_tokens(model) == before
    model.backend.close()


def test_file_that_changes_during_loading_is_an_error(tmp_path: Path) -> None:
    path = Path(shutil.copy(DEMO, tmp_path / "mine.gguf"))

    def write(_: float) -> bool:
        with path.open("ab") as file:
            file.write(b"x")
        return True

    with pytest.raises(ModelError, match="changed while it was loaded: restart when it is"):
        models.load(InferenceSettings(model_path=str(path)), write)


def test_model_without_template_rejects_chats_only(
    tmp_path: Path,
) -> None:
    model = load(without_template(tmp_path / "base.gguf"))
    assert model.no_chat_reason and "has no chat template" in model.no_chat_reason
    tokens = model.template.raw_prompt("Once upon a time", 10).tokens
    assert tokens == model.backend.tokenize("Once upon a time", special=True)
    why = r"base\.gguf has no chat template.* MODEL_CHAT_TEMPLATE .*chatml, gemma, .*completions"
    message = ChatMessage("user", "hi")
    for ask in (
        lambda: model.template.session_prompt("", (), "hi", 10),
        lambda: model.template.conversation_prompt([message], (), 10),
        lambda: model.template.tokenize_conversation([message], ()),
    ):
        with pytest.raises(ServiceError, match=why) as error:
            ask()
        assert error.value.code == "model_unavailable"
    model.backend.close()


def test_chat_template_is_chosen_by_name_or_file(tmp_path: Path) -> None:
    path = without_template(tmp_path / "base.gguf")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    shown = {}
    for chosen in ("chatml", str(tmp_path / "mine.jinja")):
        model = load(path, chosen)
        assert model.no_chat_reason is None
        tokens = model.template.session_prompt("", (), "hi", 10).tokens
        shown[chosen] = b"".join(map(model.backend.piece, tokens)).decode()
        model.backend.close()
    assert shown == {"chatml": "user\nhi\nassistant\n", str(tmp_path / "mine.jinja"): "[hi]"}
    model = load(DEMO, str(tmp_path / "mine.jinja"))  # overrides the file's own template
    assert model.template.session_prompt("", (), "hi", 10).tokens == model.backend.tokenize(
        "[hi]", True
    )
    model.backend.close()


def test_invalid_chat_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"=chatmll can't be read .*: it must be .*chatml, gemma"):
        load(DEMO, "chatmll")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match=r"MODEL_CHAT_TEMPLATE=.*bad\.jinja can't be used: its Ji"):
        load(DEMO, str(tmp_path / "bad.jinja"))


def test_quantized_cache_needs_flash_attention() -> None:
    settings = InferenceSettings(
        model_path=str(DEMO), model_kv_type="q8_0", model_flash_attention="off"
    )
    with pytest.raises(ModelError, match=r"^MODEL_KV_TYPE=q8_0 needs flash .*ATTENTION=auto\.$"):
        models.load_chat_model(settings, lambda _: True)
