import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import llama_cpp
import pytest
from llama_cpp import llama_cpp as bindings

from services.inference.engine import ggml


@pytest.fixture(autouse=True)
def not_loaded() -> Iterator[None]:
    caches = (ggml.load_backends, ggml.has_wrong_amx)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:  # what a test pretends is not for those after it
        cache.cache_clear()


def test_linked_backends_stay_the_only_ones() -> None:
    ggml.libggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    before = ggml.libggml.ggml_backend_reg_count()
    ggml.load_backends()
    assert ggml.libggml.ggml_backend_reg_count() == before >= 1


def test_backends_are_loaded_once_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the images, where no backend is linked; `just compose-test` computes with them."""
    library = Mock()
    library.ggml_backend_reg_count.return_value = 0
    monkeypatch.setattr(ggml, "libggml", library)
    ggml.load_backends()
    ggml.load_backends()
    folder = Path(llama_cpp.__file__).parent / "lib"
    library.ggml_backend_load_all_from_path.assert_called_once_with(str(folder).encode())


@pytest.mark.parametrize(
    ("compilers", "is_wrong"),
    [
        (["GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"], True),  # Debian 12
        (["GCC: (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0"], True),  # Ubuntu 22.04
        (["GCC: (GNU) 14.2.1", "GCC: (Ubuntu 13.2.0-4ubuntu3) 13.2.0"], True),
        (["GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0"], False),  # Ubuntu 24.04
        (["GCC: (Debian 14.2.0-19) 14.2.0"], False),  # Debian 13
        (["Debian clang version 14.0.6"], False),
        ([], False),
    ],
)
def test_amx_is_wrong_if_an_old_gcc_compiled_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilers: Sequence[str], is_wrong: bool
) -> None:
    library = tmp_path / "libllama.so"
    library.write_bytes(b"\x7fELF\0" + "\0".join(compilers).encode() + b"\0.comment\0")
    has_amx = Mock(return_value=b"CPU : AVX512 = 1 | AMX_INT8 = 1 | LLAMAFILE = 1 | ")
    monkeypatch.setattr(bindings, "_lib", Mock(_name=str(library)))
    monkeypatch.setattr(bindings, "llama_print_system_info", has_amx)
    assert ggml.has_wrong_amx() is is_wrong


def test_cpu_without_amx_uses_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    has_none = Mock(return_value=b"CPU : AVX2 = 1 | LLAMAFILE = 1 | ")
    monkeypatch.setattr(bindings, "llama_print_system_info", has_none)
    assert ggml.has_wrong_amx() is False
