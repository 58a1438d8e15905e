"""Rules for the tests that a program can check."""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
MAX_NAME_LENGTH = 65
MAX_SLEEP_SECONDS = 0.1

# Numbers per file that must not grow. A sleep is fine as the length of an outage or a pause.
SLEEPS = {
    "faults/test_failover.py": 2,
    "faults/test_outages.py": 2,
    "inference/test_listeners.py": 1,
}
ACCEPTED_ERRORS = {"inference/engine/sampling/test_json_schema.py": 1}

Rule = Callable[[ast.AST], bool]
Function = ast.FunctionDef | ast.AsyncFunctionDef


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
    found = Counter(
        path for path, test in all_tests() for node in own_nodes(test) if is_long_sleep(node)
    )
    assert grown(found, SLEEPS) == {}


def test_no_new_test_accepts_two_outcomes() -> None:
    """An assertion that only runs if something is raised may never run."""
    assert grown(count(is_test_that_accepts_an_error), ACCEPTED_ERRORS) == {}


def test_test_names_are_short() -> None:
    names = [test.name for _, test in all_tests()]
    assert len(names) > 1000, "the functions are found"
    assert [name for name in names if len(name) > MAX_NAME_LENGTH] == []


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
    if not (isinstance(node, Function) and node.name.startswith("test_")):
        return False
    handlers = (each for each in ast.walk(node) if isinstance(each, ast.ExceptHandler))
    return any(isinstance(each, ast.Assert) for found in handlers for each in ast.walk(found))


def all_tests() -> Iterator[tuple[str, Function]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, Function) and node.name.startswith("test_"):
                yield path, node


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below, but not those of nested functions: these fake something slow."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function):
            yield child
            yield from own_nodes(child)


def count(rule: Rule) -> dict[str, int]:
    """Return how many nodes of each file match the rule."""
    return Counter(path for path, tree in trees().items() for node in ast.walk(tree) if rule(node))


def grown(found: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    return {path: number for path, number in found.items() if number > allowed.get(path, 0)}
