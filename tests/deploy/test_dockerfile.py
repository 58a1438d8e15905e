"""Each image contains everything that its service imports; checked without Docker."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT

SERVICES = ("edge", "history", "inference")
COPY = re.compile(r"^COPY (services/\S+) services/", re.MULTILINE)


def stages() -> dict[str, str]:
    """Return the instructions of each stage of the Dockerfile by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def final_stage(service: str) -> str:
    """Return the instructions of the Dockerfile's stage that becomes the service's image."""
    return stages()[service]


def copied_modules(service: str) -> dict[str, Path]:
    """Return the image's Python files by module name."""
    files: set[Path] = set()
    for source in COPY.findall(final_stage(service)):
        path = ROOT / source
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return {module_name(path): path for path in files}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name imported from it or ""), also those imported inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{path}: a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def required_libraries(service: str) -> set[str]:
    """Return the top-level modules that the service's requirements.txt installs."""
    text = (ROOT / "services" / service / "requirements.txt").read_text()
    names = {normal(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)}
    modules = importlib.metadata.packages_distributions()
    return {
        module
        for module, distributions in modules.items()
        if names & {normal(distribution) for distribution in distributions}
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("service", SERVICES)
def test_image_contains_every_import_of_its_service(service: str) -> None:
    modules, libraries = copied_modules(service), required_libraries(service)
    assert f"services.{service}.__main__" in modules
    for path in modules.values():
        for module, name in imported(path):
            if module.split(".")[0] == "services":
                assert module in modules, f"{path} imports {module}, which the image lacks"
                is_package = modules[module].name == "__init__.py"
                assert not is_package or f"{module}.{name}" in modules or not name, (
                    f"{path}: {name}"
                )
            else:
                top = module.split(".")[0]
                assert top in libraries | set(sys.stdlib_module_names), f"{path} imports {top}"


def test_change_of_code_reinstalls_nothing() -> None:
    """Docker runs again what follows a changed COPY. Stages of a -venv copy no code at all."""
    found = stages()
    assert {f"{service}-venv" for service in SERVICES} < found.keys()
    copy_of_code = re.compile(r"^COPY (?!--from).*(?<!requirements\.txt) \S+$", re.MULTILINE)
    for name, text in found.items():
        _, *after_code = copy_of_code.split(text)
        assert not re.search("pip install|apt-get", "".join(after_code)), name


def test_llama_cpp_is_built_before_other_requirements_are_copied() -> None:
    text = stages()["inference-venv"]
    build, copy = text.index("GGML_CPU_ALL_VARIANTS"), text.index("COPY services/inference/req")
    assert text.index("COPY --from=llama-cpp-pin") < build < copy


@pytest.mark.parametrize("service", SERVICES)
def test_image_contains_pyproject_for_its_version(service: str) -> None:
    assert "COPY pyproject.toml .\n" in final_stage(service)
    assert "!pyproject.toml" in (ROOT / ".dockerignore").read_text().splitlines()


def test_image_of_secrets_contains_all_of_its_imports() -> None:
    """It is the edge's image with more files."""
    stage = final_stage("secrets")
    assert "\nFROM edge AS secrets\n" in (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"deploy/\w+\.py", stage) + ["deploy/nats/permissions.py"]
    copied += ["deploy/nats/secrets.py", "deploy/nats/__init__.py"]
    modules = copied_modules("edge") | {module_name(ROOT / path): ROOT / path for path in copied}
    own = [path for name, path in modules.items() if name.startswith("deploy")]
    for path in own:
        for module, name in imported(path):
            if module.split(".")[0] in ("deploy", "services"):
                is_package = module in modules and modules[module].name == "__init__.py"
                needed = f"{module}.{name}" if is_package and name else module
                assert needed in modules, f"{path} imports {needed}, which the image lacks"
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for path in re.findall(r"deploy/[\w./]+", stage):
        assert f"!{path.rstrip('/')}" in allowed or path == "deploy/", path
