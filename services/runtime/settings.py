"""
Settings: environment variables and `.env`, typed and checked at startup.

Each variable is the name of a field of the service's settings type, in capitals. The types are the
source of docs/settings.md (deploy/settings.py).
"""

import codecs
import difflib
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from msgspec import Meta

from services.contract import subjects
from services.runtime.logs import LogFormat

NO_DOTENV = "PYTHON_DOTENV_DISABLED"  # python-dotenv's variable: disables `.env`
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

log = logging.getLogger(__name__)
logging.getLogger("dotenv").setLevel(logging.ERROR)  # warn_of_invalid_lines does it, once

Port = Annotated[int, Meta(ge=1, le=65535)]


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    log_format: Annotated[
        LogFormat, Meta(description="`json` writes one JSON object per log line, for machines.")
    ] = "text"


class ServiceSettings(LogSettings, frozen=True, kw_only=True):
    """Settings of every service. `nats_url` is never empty: its default is built from the port."""

    nats_url: Annotated[
        str,
        Meta(
            description="Address of a running NATS server; separate those of a cluster with"
            " commas. `tls://` requires TLS. Credentials: `nats://user:password@host:4222`, with"
            " special characters percent-encoded (`@` is `%40`); they are used instead of"
            " `NATS_CREDS`. Empty: a server on `NATS_PORT` of this machine, which `just up` starts."
        ),
    ] = ""
    nats_port: Annotated[
        Port, Meta(description="Port of the nats-server that `just up` starts.")
    ] = 4222
    nats_creds: Annotated[
        str,
        Meta(
            description="File with the credentials for NATS: a `.creds` file, or the seed of an"
            " nkey. It is read again at each connect. Empty: none, or for `just up` those that it"
            " makes in `.data/secrets`."
        ),
    ] = ""
    nats_inbox_prefix: Annotated[
        str,
        Meta(
            description="First tokens of the subjects on which replies are received: `_INBOX`, or"
            " what the permissions of this user allow, such as `_INBOX.edge`."
        ),
    ] = subjects.INBOX
    nats_tls_ca: Annotated[
        str,
        Meta(
            description="File with the certificates, in PEM, of the authorities that may sign the"
            " certificate of the NATS server. With this or `NATS_TLS_CERT`, TLS is required. Empty:"
            " those of the system."
        ),
    ] = ""
    nats_tls_cert: Annotated[
        str,
        Meta(
            description="File with this client's certificate, in PEM, for a NATS server that"
            " verifies its clients. Needs `NATS_TLS_KEY`."
        ),
    ] = ""
    nats_tls_key: Annotated[
        str,
        Meta(description="File with the key of that certificate, in PEM and without a passphrase."),
    ] = ""

    otel_exporter_otlp_endpoint: Annotated[
        str,
        Meta(
            description="URL of an OpenTelemetry collector that takes OTLP over HTTP, such as"
            " `http://localhost:4318`, without `/v1/traces`: spans are exported to it. Empty: none"
            " are. OpenTelemetry's other `OTEL_…` variables apply too, from the environment only.",
        ),
    ] = ""

    def __post_init__(self) -> None:
        url = self.nats_url.strip() or f"nats://127.0.0.1:{self.nats_port}"
        msgspec.structs.force_setattr(self, "nats_url", url)


class BackendSettings(ServiceSettings, frozen=True, kw_only=True):
    """Settings of services without HTTP, whose metrics can have a port of their own."""

    metrics_host: Annotated[
        str,
        Meta(
            description="Address of `INFERENCE_METRICS_PORT` and `HISTORY_METRICS_PORT`. The images"
            " listen on all addresses."
        ),
    ] = "127.0.0.1"


S = TypeVar("S", bound=msgspec.Struct)


class InvalidSetting(Exception):
    """A variable has an invalid value. The message names both, and what it must be."""


def load(kind: type[S], environ: Mapping[str, str] | None = None) -> S:
    """
    Return the settings of one service. The environment overrides `.env`; an empty value means the
    default.

    Raises InvalidSetting if a value can't be used. Warns of variables that look misspelt and, if it
    reads `.env` itself, of invalid lines.
    """
    if environ is None:
        environ = environment()
        warn_of_invalid_lines()
    _warn_of_misspelt({field.name.upper() for field in msgspec.structs.fields(kind)}, environ)
    return parse(kind, environ)


def parse(kind: type[S], environ: Mapping[str, str]) -> S:
    """Do the same as `load`, without the warnings."""
    fields = {field.name.upper(): field for field in msgspec.structs.fields(kind)}
    given = {
        field.name: _convert(name, environ[name], field.type)
        for name, field in fields.items()
        if environ.get(name) and not _is_injected_by_kubernetes(name, environ[name])
    }
    return kind(**given)


def own_environment(
    kind: type[msgspec.Struct], others: Iterable[type[msgspec.Struct]], environ: Mapping[str, str]
) -> dict[str, str]:
    """
    Return the environment without the settings of `others`, misspelt ones included: a process gets
    no secret that it does not need.
    """
    foreign = set().union(*map(_prefixes, others)) - _prefixes(kind)
    return {name: value for name, value in environ.items() if name.split("_")[0] not in foreign}


def _prefixes(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name.split("_")[0].upper() for field in msgspec.structs.fields(kind)}


def environment() -> dict[str, str]:
    """
    Return the variables of the process, and those of `.env` that it does not set.

    Raises InvalidSetting if the file can't be read.
    """
    values = dotenv_values(stream=io.StringIO(_read_dotenv()))
    return {name: value for name, value in values.items() if value is not None} | dict(os.environ)


def warn_of_invalid_lines() -> None:
    """Log a warning for each line of `.env` that is not NAME=value."""
    for binding in parse_stream(io.StringIO(_read_dotenv())):
        if binding.error:
            log.warning(".env, line %d is not NAME=value: ignored", binding.original.line)


def _read_dotenv(path: Path = Path(".env")) -> str:
    """Decode UTF-8, with or without a byte order mark, and UTF-16 with one (PowerShell)."""
    if os.environ.get(NO_DOTENV):
        return ""
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


def _convert(name: str, value: str, kind: object) -> object:
    try:
        is_json = _type(kind) is not str and value.lstrip().startswith(("[", "{"))
        parsed = msgspec.json.decode(value) if is_json else value
        return msgspec.convert(parsed, kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidSetting(f"{name}={value!r} can't be used: {_reason(error, kind)}.") from error


def _type(kind: Any) -> Any:
    """Return the type without its Annotated."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false"}
_TYPE_MISMATCH = re.compile(r"Expected `(int|float|bool)(?: \| null)?`, got")


def _reason(error: Exception, kind: object) -> str:
    text = str(error)
    if "Expected `array`" in text:
        example = "[3, 1]" if _TYPE_NAMES["float"] in _allowed(kind) else '["a", "b"]'
        return f"it must be a JSON list such as {example}"
    if "Expected `object`" in text:
        return 'it must be a JSON object such as {"name": true}'
    if mismatch := _TYPE_MISMATCH.match(text):
        return f"it must be {_TYPE_NAMES[mismatch[1]]}"
    if "Invalid enum value" in text:
        return f"it must be {' or '.join(_allowed(kind))}"
    return text


def _allowed(kind: Any) -> Iterator[str]:
    """Yield the values that a type allows, in words."""
    kind = _type(kind)
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif kind in (int, float, bool):
        yield _TYPE_NAMES[kind.__name__]
    else:
        for each in get_args(kind):
            yield from _allowed(each)


def _is_injected_by_kubernetes(name: str, value: str) -> bool:
    """For a service named `edge`, Kubernetes sets EDGE_PORT=tcp://10.0.0.1:8002 in every pod."""
    return name.endswith("_PORT") and value.startswith("tcp://")


def _warn_of_misspelt(known: set[str], environ: Mapping[str, str]) -> None:
    prefixes = {name.split("_")[0] for name in known}
    for name in environ:
        if name in known or name.split("_")[0] not in prefixes:
            continue
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            log.warning("%s is not a setting: did you mean %s?", name, near)
