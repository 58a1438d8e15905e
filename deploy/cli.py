"""
`finetunellm COMMAND`, the program of an installed package: it replaces itself by a module.

In a clone, `just` has the same commands. Both use the current folder: `.data/`, `model/` and `.env`
are there.
"""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple, NoReturn

from deploy import as_user
from services.contract.version import VERSION
from services.runtime.settings import InvalidSetting

INVALID_ARGUMENTS = 2  # exit code
LIBRARIES = {
    "all": "llama_cpp",
    "edge": "litestar",
    "evaluation": "jsonschema_rs",
    "history": "motor",
    "inference": "llama_cpp",
    "pull": "huggingface_hub",
    "terminal": "prompt_toolkit",
}
"""A module that each extra of the package installs."""


class Command(NamedTuple):
    """`extra` is that of the package that the module needs, `user` its user of NATS, if any."""

    module: str
    about: str
    extra: str | None
    has_arguments: bool = True
    user: str | None = None
    arguments: tuple[str, ...] = ()
    """Those that precede the given ones."""


COMMANDS = {
    "up": Command("deploy.up", "Run NATS and all services until Ctrl-C", "all", False),
    "chat": Command("services.terminal", "Chat in the terminal", "terminal", user="client"),
    "keys": Command("services.edge.manage_keys", "Manage API keys", "edge", user="edge"),
    "secrets": Command("deploy.nats.secrets", "Make keys for NATS in .data/secrets", None),
    "backup": Command(
        "deploy.backup",
        "Back up NATS and MongoDB into a new folder while all runs",
        "history",
        user="admin",
        arguments=("backup",),
    ),
    "restore": Command(
        "deploy.backup",
        "Restore a backup into empty servers, while no service runs",
        "history",
        user="admin",
        arguments=("restore",),
    ),
    "pull": Command("deploy.pull", "Download a GGUF model from Hugging Face into model/", "pull"),
    "dataset": Command("deploy.dataset", "Write conversations as training data", None),
    "eval": Command("evaluation", "Hold a model's answers against expectations", "evaluation"),
    "edge": Command("services.edge", "Run the HTTP server in front of NATS", "edge", False),
    "inference": Command("services.inference", "Run a worker, with one model", "inference", False),
    "history": Command("services.history", "Run the store of the sessions", "history", False),
}
USAGE = "usage: finetunellm COMMAND …"
SETTINGS = """\
Settings are environment variables, or lines of the file .env in the current folder. Models are in
its folder model/, data is in .data/."""


def main() -> None:
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            rows = (f"  {name:<10} {command.about}" for name, command in COMMANDS.items())
            print(USAGE, "", *rows, "", SETTINGS, sep="\n")
        case ["--version"]:
            print(f"finetunellm {VERSION}")
        case [name, *arguments] if name in COMMANDS:
            run(name, arguments)
        case [name, *_]:
            fail(f"finetunellm has no command {name!r}. It has: {', '.join(COMMANDS)}.")


def run(name: str, arguments: Sequence[str]) -> None:
    """Replace this process by a command's module, unless something is wrong."""
    command = COMMANDS[name]
    if not command.has_arguments and arguments:
        if arguments[0] in ("-h", "--help"):
            print(f"usage: finetunellm {name}", "", f"{command.about}.", SETTINGS, sep="\n")
            return
        fail(f"`finetunellm {name}` takes no arguments. {SETTINGS}")
    if command.extra and find_spec(LIBRARIES[command.extra]) is None:
        fail(f"`finetunellm {name}` lacks packages: install `finetunellm[{command.extra}]`.")
    # the current folder can be any: none of its files may replace a module
    os.environ["PYTHONSAFEPATH"] = "1"
    program = [command.module, *command.arguments, *arguments]
    if command.user is None:
        os.execv(sys.executable, [sys.executable, "-m", *program])
    try:
        as_user.main(command.user, *program)
    except InvalidSetting as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(INVALID_ARGUMENTS)
