"""
Environment variables and `.env`, typed and checked at start; each is a field's name in capitals.
"""

import difflib
import logging
import os
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from dotenv import dotenv_values

log = logging.getLogger(__name__)


class BusSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every service needs."""

    nats_url: str = "nats://127.0.0.1:4222"


S = TypeVar("S", bound=msgspec.Struct)


class BadSetting(Exception):
    """Names the variable, its value, and what it must be."""


def load(kind: type[S], environ: Mapping[str, str] | None = None) -> S:
    """
    The settings of one service. The environment wins over `.env`; an empty value means the default.

    Raises BadSetting for a value that can't be; warns of a variable that looks like a misspelt one.
    """
    if environ is None:
        environ = {k: v for k, v in dotenv_values(".env").items() if v is not None} | dict(
            os.environ
        )
    fields = {field.name.upper(): field for field in msgspec.structs.fields(kind)}
    _warn_of_misspelt(set(fields), environ)
    given = {
        field.name: _convert(name, environ[name], field.type)
        for name, field in fields.items()
        if environ.get(name) and not _injected_by_kubernetes(name, environ[name])
    }
    return kind(**given)


def _convert(name: str, value: str, kind: object) -> object:
    try:
        is_list = kind is not str and value.lstrip().startswith("[")
        parsed = msgspec.json.decode(value) if is_list else value
        return msgspec.convert(parsed, kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise BadSetting(f"{name}={value!r} can't be used: {error}.") from error


def _injected_by_kubernetes(name: str, value: str) -> bool:
    """For a service named `edge`, Kubernetes sets EDGE_PORT=tcp://10.0.0.1:8002 in every pod."""
    return name.endswith("_PORT") and value.startswith("tcp://")


def _warn_of_misspelt(known: set[str], environ: Mapping[str, str]) -> None:
    prefixes = {name.split("_")[0] for name in known}
    for name in environ:
        if name in known or name.split("_")[0] not in prefixes:
            continue
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            log.warning("%s is no setting: did you mean %s?", name, near)
