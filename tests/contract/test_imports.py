"""Imports run one way, and what only one package may know stays in it (docs/architecture.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SERVICES = Path("services")
MAY_IMPORT = {
    "contract": {"contract"},
    "runtime": {"runtime", "contract"},
    "client": {"client", "runtime", "contract"},
    "edge": {"edge", "client", "runtime", "contract"},
    "inference": {"inference", "client", "runtime", "contract"},
    "history": {"history", "runtime", "contract"},
    "terminal": {"terminal", "client", "runtime", "contract"},
}
ONLY_IN = {
    "nats": "services/runtime/",
    "llama_cpp": "services/inference/engine/",
    "motor": "services/history/archive.py",
    "litestar": "services/edge/",
    "prompt_toolkit": "services/terminal/",
    "rich": "services/terminal/",
}
SUBJECT = re.compile(r"^(chat|history)\.(request|reply|cancel|worker|replay|log|context|messages)")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in SERVICES.rglob("*.py"):
        yield path, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_services_never_import_each_other() -> None:
    for path, tree in modules():
        package = path.parts[1]
        for name in imports(tree):
            if name.startswith("services."):
                assert name.split(".")[1] in MAY_IMPORT[package], f"{path} imports {name}"


def test_engine_imports_no_bus() -> None:
    for path, tree in modules():
        if "engine" in path.parts:
            for name in imports(tree):
                assert not name.startswith(("services.runtime", "nats", "asyncio")), (
                    f"{path}: {name}"
                )


def test_each_library_is_imported_in_one_place() -> None:
    for path, tree in modules():
        for name in imports(tree):
            home = ONLY_IN.get(name.split(".")[0])
            assert home is None or str(path).startswith(home), f"{path} imports {name}"


def test_subjects_are_spelled_only_in_the_contract() -> None:
    for path, tree in modules():
        if path.parts[1] == "contract":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not SUBJECT.match(node.value), f"{path}:{node.lineno} {node.value}"
