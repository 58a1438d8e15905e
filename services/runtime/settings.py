"""
Environment variables and `.env`, typed and checked at start; each is a field's name in capitals.
"""

import codecs
import difflib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from dotenv import dotenv_values
from dotenv.parser import parse_stream

NO_DOTENV = "PYTHON_DOTENV_DISABLED"  # python-dotenv's variable: disables `.env`
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

log = logging.getLogger(__name__)
logging.getLogger("dotenv").setLevel(logging.ERROR)  # _warn_of_bad_lines does it, once


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of every service: NATS at `nats_url`, by default at `nats_port` of this machine."""

    nats_url: str = ""
    nats_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 4222

    def __post_init__(self) -> None:
        url = self.nats_url.strip() or f"nats://127.0.0.1:{self.nats_port}"
        msgspec.structs.force_setattr(self, "nats_url", url)


S = TypeVar("S", bound=msgspec.Struct)


class InvalidSetting(Exception):
    """Names the variable, its value, and what it must be."""


def load(kind: type[S], environ: Mapping[str, str] | None = None) -> S:
    """
    Return the settings of one service. The environment overrides `.env`; an empty value means the
    default.

    Raises InvalidSetting for a value that can't be used; warns of a variable that looks misspelt.
    """
    environ = environment() if environ is None else environ
    _warn_of_misspelt({field.name.upper() for field in msgspec.structs.fields(kind)}, environ)
    return parse(kind, environ)


def parse(kind: type[S], environ: Mapping[str, str]) -> S:
    """Do the same as `load`, without the warnings."""
    fields = {field.name.upper(): field for field in msgspec.structs.fields(kind)}
    given = {
        field.name: _convert(name, environ[name], field.type)
        for name, field in fields.items()
        if environ.get(name) and not _injected_by_kubernetes(name, environ[name])
    }
    return kind(**given)


def environment() -> dict[str, str]:
    """
    Return the variables of the process, and those of `.env` that it does not set. Warn of each
    line of `.env` that is not NAME=value. Raises InvalidSetting if the file can't be read.
    """
    if os.environ.get(NO_DOTENV):
        return dict(os.environ)
    text = _read_dotenv(Path(".env"))
    _warn_of_bad_lines(text)
    values = dotenv_values(stream=io.StringIO(text))
    return {k: v for k, v in values.items() if v is not None} | dict(os.environ)


def _read_dotenv(path: Path) -> str:
    """Decode UTF-8, with or without a byte order mark, and UTF-16 with one (PowerShell)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InvalidSetting(f"{path} can't be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidSetting(f"{path} is not UTF-8 (line {line}): save it as UTF-8.") from error
    if "\0" in text:
        raise InvalidSetting(f"{path} is not a text file in UTF-8: save it as UTF-8.")
    return text


def _warn_of_bad_lines(text: str) -> None:
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            log.warning(".env, line %d is not NAME=value: ignored", binding.original.line)


def _convert(name: str, value: str, kind: object) -> object:
    try:
        is_list = kind is not str and value.lstrip().startswith("[")
        parsed = msgspec.json.decode(value) if is_list else value
        return msgspec.convert(parsed, kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        why = "it must be a JSON list" if "Expected `array`" in str(error) else error
        raise InvalidSetting(f"{name}={value!r} can't be used: {why}.") from error


def _injected_by_kubernetes(name: str, value: str) -> bool:
    """For a service named `edge`, Kubernetes sets EDGE_PORT=tcp://10.0.0.1:8002 in every pod."""
    return name.endswith("_PORT") and value.startswith("tcp://")


def _warn_of_misspelt(known: set[str], environ: Mapping[str, str]) -> None:
    prefixes = {name.split("_")[0] for name in known}
    for name in environ:
        if name in known or name.split("_")[0] not in prefixes:
            continue
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            log.warning("%s is not a setting: did you mean %s?", name, near)
