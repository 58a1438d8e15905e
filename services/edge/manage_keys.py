"""
`just keys add|list|revoke`: manage API keys, over NATS or in a key file.

A key is printed once, when it is made; only its SHA-256 is stored.
"""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path

import msgspec

from services.contract.errors import ServiceError
from services.contract.version import COMMAND
from services.edge.api.keys import KeyBody, make_key
from services.edge.key_sources import KeyBucket, KeyFile, read_file
from services.edge.keys import ApiKey, select
from services.edge.settings import EdgeSettings
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting, load
from services.runtime.streams import StreamUnavailable

CONNECT_SECONDS = 5.0
HEADINGS = ("ID", "NAME", "MODELS", "PARALLEL", "REQUESTS/MIN", "TOKENS/MIN", "EXPIRES", "")


def main() -> None:
    logging.getLogger("services.runtime").setLevel(logging.ERROR)
    try:
        arguments = _parser().parse_args()
        if arguments.file:
            _in_file(arguments, arguments.file)
        else:
            asyncio.run(_in_bucket(arguments))
    except (InvalidSetting, ServiceError, StreamUnavailable, ConnectionError) as error:
        sys.exit(str(error))
    except msgspec.ValidationError as error:
        sys.exit(f"This key can't be made: {error}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{COMMAND} keys", description="Manage API keys.")
    commands = parser.add_subparsers(required=True, dest="command")
    add = commands.add_parser("add", help="make a key and print it")
    add.add_argument("name", metavar="NAME", help="the tenant: whose sessions the key opens")
    add.add_argument("--admin", action="store_true", help="may manage keys and see all metrics")
    add.add_argument(
        "--models", default="", help="names as in /v1/models, with commas; `*` stands for any text"
    )
    add.add_argument("--parallel", type=int, help="answers at a time")
    add.add_argument("--requests-per-minute", type=int)
    add.add_argument("--tokens-per-minute", type=int, help="of prompts and answers")
    add.add_argument("--expires-in-days", type=int)
    commands.add_parser("list", help="print all keys, without their secrets")
    revoke = commands.add_parser("revoke", help="delete a key")
    revoke.add_argument("name", metavar="NAME|ID", help="all keys of a name, or one by its id")
    for command in commands.choices.values():
        command.add_argument(
            "--file", type=Path, help="change this key file (EDGE_KEYS_FILE) instead"
        )
    return parser


async def _in_bucket(arguments: argparse.Namespace) -> None:
    settings = load(EdgeSettings)
    connecting = Bus.connect(settings.nats_url, "keys", NatsAccess.of(settings))
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                bus = await stack.enter_async_context(connecting)
        except TimeoutError:
            raise ConnectionError(f"NATS can't be reached: is `{COMMAND} up` running?") from None
        await _change(arguments, KeyBucket(bus))


async def _change(arguments: argparse.Namespace, bucket: KeyBucket) -> None:
    match arguments.command:
        case "add":
            secret, key = make_key(_body(arguments))
            _print_new(secret, await bucket.add(key))
        case "list":
            _print_table(await bucket.keys())
        case "revoke":
            _print_revoked(await bucket.revoke(arguments.name))


def _in_file(arguments: argparse.Namespace, path: Path) -> None:
    """Change a key file. Edges read it again within a second."""
    keys = read_file(path) if path.exists() else ()
    match arguments.command:
        case "add":
            secret, key = make_key(_body(arguments))
            _write(path, (*keys, key))
            _print_new(secret, key)
        case "list":
            _print_table(keys)
        case "revoke":
            revoked = select(keys, arguments.name)
            _write(path, tuple(key for key in keys if key not in revoked))
            _print_revoked(revoked)


def _write(path: Path, keys: tuple[ApiKey, ...]) -> None:
    """Replace the file at once. A new one is readable by its owner only."""
    content = msgspec.json.format(msgspec.json.encode(KeyFile(keys)))
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content + b"\n")
        if path.exists():  # an edge of another user must be able to go on reading it
            before = path.stat()
            os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o777)
    temporary.replace(path)


def _body(arguments: argparse.Namespace) -> KeyBody:
    """Raises msgspec.ValidationError."""
    models = tuple(filter(None, map(str.strip, arguments.models.split(","))))
    given = {name: getattr(arguments, name) for name in KeyBody.__struct_fields__}
    return msgspec.convert(given | {"models": models}, KeyBody)


def _print_new(secret: str, key: ApiKey) -> None:
    print(f"The key of {key.name} (id {key.id}), which is shown only now:\n", file=sys.stderr)
    print(secret)


def _print_revoked(keys: Sequence[ApiKey]) -> None:
    for key in keys:
        print(f"Revoked the key {key.id} of {key.name}.")


def _print_table(keys: Sequence[ApiKey]) -> None:
    if not keys:
        print(f"There are no keys. `{COMMAND} keys add NAME` makes one.")
        return
    rows = [HEADINGS, *map(_row, keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _row(key: ApiKey) -> tuple[str, ...]:
    return (
        key.id,
        key.name,
        ", ".join(key.models) or "all",
        _or_dash(key.parallel),
        _or_dash(key.requests_per_minute),
        _or_dash(key.tokens_per_minute),
        _or_dash(key.expires),
        "admin" if key.admin else "",
    )


def _or_dash(value: int | datetime | None) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
