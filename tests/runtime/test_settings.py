import logging
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.settings import (
    InvalidSetting,
    LogSettings,
    ServiceSettings,
    load,
    own_environment,
)


class Settings(ServiceSettings, frozen=True, kw_only=True):
    model_context: Annotated[int, msgspec.Meta(ge=64)] = 2048
    model_path: str = ""
    chat_system_prompt: Annotated[str, msgspec.Meta(description="A text.")] = ""
    edge_port: int = 8002
    chat_temperature: Annotated[float, msgspec.Meta(ge=0)] | None = 0.5
    chat_stop: tuple[str, ...] = ("User:",)


def test_missing_variable_means_the_default() -> None:
    assert load(Settings, {}) == Settings()


def test_variable_is_converted_to_the_type_of_its_field() -> None:
    settings = load(
        Settings,
        {"MODEL_CONTEXT": "4096", "CHAT_TEMPERATURE": "1", "CHAT_STOP": '["a", "\\n\\nb"]'},
    )
    assert settings.model_context == 4096
    assert settings.chat_temperature == 1.0
    assert settings.chat_stop == ("a", "\n\nb")


def test_empty_variable_means_the_default() -> None:
    assert load(Settings, {"MODEL_CONTEXT": ""}).model_context == 2048


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MODEL_CONTEXT", "many", "it must be an integer"),
        ("MODEL_CONTEXT", "3", ">= 64"),
        ("CHAT_TEMPERATURE", "hot", "it must be a number"),
        ("CHAT_STOP", "[unclosed", "malformed"),
        ("CHAT_STOP", "User:", "it must be a JSON list"),
    ],
)
def test_invalid_value_is_rejected_by_name_and_reason(name: str, value: str, why: str) -> None:
    with pytest.raises(InvalidSetting, match=f"{name}='.*{why}"):
        load(Settings, {name: value})


def test_text_may_start_with_a_bracket() -> None:
    assert load(Settings, {"MODEL_PATH": "[my] model.gguf"}).model_path == "[my] model.gguf"
    prompt = "{name} is a bot."
    assert load(Settings, {"CHAT_SYSTEM_PROMPT": prompt}).chat_system_prompt == prompt
    assert load(Settings, {"CHAT_STOP": ' ["a"]'}).chat_stop == ("a",)


def test_invalid_request_parameter_is_no_valid_default() -> None:
    for name, value in (("CHAT_STOP", '[""]'), ("CHAT_MAX_TOKENS", "2000000")):
        with pytest.raises(InvalidSetting, match=name):
            load(InferenceSettings, {name: value})


def test_misspelt_variable_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(Settings, {"MODEL_CONTEX": "1", "HOME": "/", "EDGE_SERVICE_HOST": "10.0.0.1"})
    assert caplog.messages == ["MODEL_CONTEX is not a setting: did you mean MODEL_CONTEXT?"]


def test_port_injected_by_kubernetes_is_ignored() -> None:
    assert load(Settings, {"EDGE_PORT": "tcp://10.0.0.1:8002"}).edge_port == 8002


def test_environment_overrides_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MODEL_CONTEXT=512\nMODEL_PATH=from-file.gguf\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_CONTEXT", "1024")
    assert load(Settings).model_context == 1024
    assert load(Settings).model_path == "from-file.gguf"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dotenv_of_windows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    (tmp_path / ".env").write_bytes("MODEL_PATH=größe.gguf\r\nEDGE_PORT=1\r\n".encode(encoding))
    monkeypatch.chdir(tmp_path)
    assert load(Settings) == Settings(model_path="größe.gguf", edge_port=1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("EDGE_PORT=1\nMODEL_PATH=größe\n".encode("latin-1"), r"not UTF-8 \(line 2\)"),
        ("EDGE_PORT=1\n".encode("utf-16-le"), "not a text file"),
    ],
)
def test_dotenv_in_another_encoding_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, why: str
) -> None:
    (tmp_path / ".env").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSetting, match=rf"^\.env is {why}.*save it as UTF-8\.$"):
        load(Settings)


def test_dotenv_that_is_a_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSetting, match=r"^\.env can't be read: Is a directory\.$"):
        load(Settings)


def test_invalid_dotenv_line_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".env").write_text("# good\nEDGE_PORT=1\nexport MODEL_PATH=a\nEDGE_PORT: 2\n")
    monkeypatch.chdir(tmp_path)
    assert load(Settings) == Settings(model_path="a", edge_port=1)
    assert caplog.messages == [".env, line 4 is not NAME=value: ignored"]


def test_nats_port_changes_the_default_url() -> None:
    assert load(Settings, {}).nats_url == "nats://127.0.0.1:4222"
    assert load(Settings, {"NATS_PORT": "14222"}).nats_url == "nats://127.0.0.1:14222"
    given = {"NATS_PORT": "14222", "NATS_URL": "nats://there:1 "}
    assert load(Settings, given).nats_url == "nats://there:1"


def test_process_gets_no_settings_of_others() -> None:
    environ = {"PATH": "/bin", "NATS_URL": "n", "EDGE_API_KEYS": "k", "EDGE_API_KEY": "typo"}
    environ |= {"MONGODB_URI": "m", "MODEL_PATH": "x", "CHAT_STOP": "[]"}
    kinds = (EdgeSettings, HistorySettings, InferenceSettings)

    def left(kind: type[msgspec.Struct]) -> set[str]:
        return environ.keys() - own_environment(kind, kinds, environ).keys()

    edge, mongodb, model = {"EDGE_API_KEYS", "EDGE_API_KEY"}, {"MONGODB_URI"}, {"MODEL_PATH"}
    model |= {"CHAT_STOP"}
    assert left(EdgeSettings) == mongodb | model
    assert left(HistorySettings) == edge | model
    assert left(InferenceSettings) == edge | mongodb
    assert left(LogSettings) == {"NATS_URL"} | edge | mongodb | model
