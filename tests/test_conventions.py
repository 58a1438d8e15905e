"""Rules for the tests that a program can check."""

import ast
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
MAX_SLEEP_SECONDS = 0.1

# Numbers per file that must not grow. A sleep is fine where it is the length of an outage, a fake
# service's delay, the pause of a loop that waits for an event, or the bound of "nothing happens".
SLEEPS = {
    "client/test_main.py": 1,
    "e2e/stack.py": 1,
    "edge/test_sse.py": 2,
    "faults/test_failover.py": 2,
    "faults/test_outages.py": 2,
    "history/test_repair.py": 1,
    "history/test_sessions.py": 2,
    "inference/test_listeners.py": 1,
    "runtime/test_bus.py": 2,
    "runtime/test_cluster.py": 1,
}
ACCEPTED_ERRORS = {
    "inference/engine/sampling/test_grammar.py": 1,
    "inference/engine/sampling/test_json_schema.py": 3,
}

Rule = Callable[[ast.AST], bool]


@cache
def trees() -> dict[str, ast.Module]:
    """Return the parsed test files by path."""
    return {
        str(path.relative_to(TESTS)): ast.parse(path.read_text()) for path in TESTS.rglob("*.py")
    }


def test_no_test_patches_a_constant_by_name() -> None:
    """Limits are passed in: a patch of a renamed constant would have no effect."""
    assert count(is_patch_of_constant) == {}


def test_no_new_long_sleeps() -> None:
    """A sleep is too short on a busy machine and too long on others: wait for the event."""
    assert grown(count(is_long_sleep), SLEEPS) == {}


def test_no_new_test_accepts_two_outcomes() -> None:
    """An assertion that only runs if something is raised may never run."""
    assert grown(count(is_test_that_accepts_an_error), ACCEPTED_ERRORS) == {}


def test_rules_find_what_they_forbid() -> None:
    source = """
def test_a():
    monkeypatch.setattr(module, "LIMIT", 1)
    monkeypatch.setattr("module.LIMIT", 1)
    time.sleep(0.5)
    try:
        ask()
    except ServiceError as error:
        assert error.code
"""
    nodes = list(ast.walk(ast.parse(source)))
    rules = (is_patch_of_constant, is_long_sleep, is_test_that_accepts_an_error)
    assert [sum(map(rule, nodes)) for rule in rules] == [2, 1, 1]


def is_patch_of_constant(node: ast.AST) -> bool:
    match node:
        case ast.Call(
            func=ast.Attribute(attr="setattr") | ast.Name(id="setattr"),
            args=[ast.Constant(value=str(name)), *_] | [_, ast.Constant(value=str(name)), *_],
        ):
            return name.rpartition(".")[2].isupper()
    return False


def is_long_sleep(node: ast.AST) -> bool:
    match node:
        case ast.Call(
            func=ast.Attribute(attr="sleep"),
            args=[ast.Constant(value=int(seconds) | float(seconds)), *_],
        ):
            return seconds > MAX_SLEEP_SECONDS
    return False


def is_test_that_accepts_an_error(node: ast.AST) -> bool:
    if not is_test(node):
        return False
    handlers = (each for each in ast.walk(node) if isinstance(each, ast.ExceptHandler))
    return any(isinstance(each, ast.Assert) for found in handlers for each in ast.walk(found))


def is_test(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name.startswith("test_")
    return False


def count(rule: Rule) -> dict[str, int]:
    """Return how many nodes of each file match the rule."""
    return Counter(path for path, tree in trees().items() for node in ast.walk(tree) if rule(node))


def grown(found: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    return {path: number for path, number in found.items() if number > allowed.get(path, 0)}
