import ctypes
from pathlib import Path
from unittest.mock import Mock

import llama_cpp
import pytest

from services.inference.engine import ggml


@pytest.fixture(autouse=True)
def not_loaded() -> None:
    ggml.load_backends.cache_clear()


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
