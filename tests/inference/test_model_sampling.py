"""Sampling defaults from a model's file, the settings, and the request."""

import logging
from pathlib import Path

import gguf
import pytest

from services.contract.conversation import ChatMessage
from services.contract.messages import ChatRequest, Sampling
from services.inference import model_sampling, models
from services.inference.settings import InferenceSettings
from tests.inference.gguf_files import Value, changed_demo

HI = ChatMessage("user", "hi")


def load(path: Path) -> models.LoadedModel:
    return models.load_chat_model(
        InferenceSettings(model_path=str(path), model_threads=1), lambda _: True
    )


def test_sampling_of_a_file_becomes_the_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own: dict[str, Value] = {
        "general__sampling__temp": 0.7,
        "general__sampling__top_k": 20,
        "general__sampling__min_p": 0.05,
        "general__sampling__penalty_repeat": 1.05,
    }
    with caplog.at_level(logging.INFO):
        model = load(changed_demo(tmp_path / "mine.gguf", **own))
    model.backend.close()
    (line,) = [each for each in caplog.messages if each.startswith("sampling defaults")]
    assert line == (
        "sampling defaults of the model temperature=0.7 top_k=20 min_p=0.05 repeat_penalty=1.05"
    )
    settings = InferenceSettings(chat_top_k=30)
    session = settings.fill_in(ChatRequest(prompt="hi", min_p=0.2), model.sampling)
    assert (session.temperature, session.top_k, session.min_p) == (0.7, 30, 0.2)
    assert (session.top_p, session.repeat_penalty) == (0.9, 1.05)
    stateless = settings.fill_in(ChatRequest(messages=(HI,)), model.sampling)
    assert (stateless.temperature, stateless.top_k, stateless.min_p) == (0.7, 30, 0.05)
    assert (stateless.top_p, stateless.repeat_penalty) == (0.9, 1.0)


def test_samplers_of_a_file_become_the_default_and_can_be_off() -> None:
    texts = {
        "general.sampling.xtc_probability": "0.5",
        "general.sampling.xtc_threshold": "0.2",
        "general.sampling.penalty_last_n": "-1",
        "general.sampling.mirostat": "2",
        "general.sampling.mirostat_tau": "4.5",
        "general.sampling.mirostat_eta": "7",
    }
    own = model_sampling.read(texts.get)
    assert own == Sampling(
        xtc_probability=0.5, xtc_threshold=0.2, repeat_last_n=-1, mirostat=2, mirostat_tau=4.5
    )
    given = InferenceSettings().fill_in(ChatRequest(prompt="hi", mirostat=0), own)
    assert (given.mirostat, given.xtc_probability) == (0, 0.5)


def test_file_without_sampling_leaves_the_defaults(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = load(Path("model/demo.gguf"))
    model.backend.close()
    assert model.sampling == Sampling() and "sampling" not in caplog.text
    given = InferenceSettings().fill_in(ChatRequest(prompt="hi"), model.sampling)
    assert (given.temperature, given.top_p, given.top_k, given.repeat_penalty) == (
        0.5,
        0.9,
        40,
        1.1,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temp", "hot"),
        ("temp", "-1.000000"),
        ("temp", "nan"),
        ("temp", "inf"),
        ("top_p", "0.000000"),
        ("top_p", "7"),
        ("top_k", "40.5"),
        ("top_k", "-1"),
        ("top_k", "true"),
        ("min_p", "null"),
        ("penalty_repeat", "0"),
    ],
)
def test_invalid_sampling_of_a_file_is_logged_and_ignored(
    key: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = {"general.sampling.top_k": "7", f"general.sampling.{key}": value}
    with caplog.at_level(logging.INFO):
        sampling = model_sampling.read(file.get)
    assert sampling == (Sampling() if key == "top_k" else Sampling(top_k=7))
    (line,) = caplog.messages
    assert line.endswith(f"ignored: {model_sampling.PARAMETERS[key]}={value!r}")


def test_whole_numbers_may_be_stored_as_floats() -> None:
    file = {"general.sampling.top_k": "20.000000", "general.sampling.temp": "1"}
    assert model_sampling.read(file.get) == Sampling(top_k=20, temperature=1)


def test_setting_of_zero_wins_over_the_file() -> None:
    own = Sampling(temperature=0.7, top_k=20)
    given = InferenceSettings(chat_temperature=0, chat_top_k=0).fill_in(ChatRequest(), own)
    assert (given.temperature, given.top_k) == (0, 0)


def test_every_key_of_llama_is_used_but_the_order_of_samplers() -> None:
    keys = vars(gguf.Keys.General)
    known = {key for name, key in keys.items() if name.startswith("SAMPLING_")}
    used = {model_sampling.PREFIX + key for key in model_sampling.PARAMETERS}
    assert known - used == {"general.sampling.sequence"} and used <= known


def test_every_parameter_of_a_file_reaches_the_sampler(tmp_path: Path) -> None:
    values: dict[str, Value] = {
        "temp": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.25,
        "penalty_repeat": 1.25,
        "penalty_last_n": 32,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.125,
        "mirostat": 2,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.25,
    }
    assert values.keys() == model_sampling.PARAMETERS.keys()
    own = {f"general__sampling__{key}": value for key, value in values.items()}
    model = load(changed_demo(tmp_path / "mine.gguf", **own))
    for key, name in model_sampling.PARAMETERS.items():
        assert getattr(model.sampling, name) == values[key]
    sampling = InferenceSettings().fill_in(ChatRequest(prompt="hi"), model.sampling)
    model.backend.sampler(sampling).close()
    model.backend.close()
