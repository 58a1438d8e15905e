"""ggml's backends: what computes on a CPU or a GPU."""

import ctypes
import functools
import logging
import re
from pathlib import Path

from llama_cpp import llama_cpp

# Found through libllama, whose copy of ggml computes. A wheel has no links, so libggml.so, which
# llama_cpp._ggml opens, is another file than libggml.so.0, with devices of its own.
libggml = llama_cpp._lib

FIXED_GCC = {11: 5, 12: 4, 13: 3}
"""The first minor versions without https://gcc.gnu.org/PR114098; other major versions lack it."""
_GCC = re.compile(rb"GCC: \([^)]*\) (\d+)\.(\d+)")

log = logging.getLogger(__name__)


def _on_message(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    log.info("%s", text.decode(errors="replace").strip())


_callback = llama_cpp.llama_log_callback(_on_message)  # llama.cpp keeps no reference


@functools.cache
def load_backends() -> None:
    """
    Load the backends that are libraries of their own (GGML_BACKEND_DL): those of GPUs, and the CPU
    kernels that suit this CPU best. Nothing else does so in Python, and without backends no model
    can be loaded: https://github.com/abetlen/llama-cpp-python/issues/2069

    Backends that are linked are there already. Otherwise llama.cpp then logs by `logging`.
    """
    libggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if libggml.ggml_backend_reg_count() == 0:
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
        libggml.ggml_backend_load_all_from_path(str(llama_cpp._base_path).encode())


@functools.cache
def has_wrong_amx() -> bool:
    """
    Return whether this CPU has Intel's AMX, and llama.cpp's kernels for it end the process with
    SIGILL: an older GCC drops most of the tile configuration
    (https://github.com/ggml-org/llama.cpp/pull/26954). Call `load_backends` first.
    """
    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info():
        return False
    compilers = _GCC.findall(Path(llama_cpp._lib._name).read_bytes())  # in the section .comment
    for major, minor in compilers:
        if int(minor) < FIXED_GCC.get(int(major), 0):
            version = f"{major.decode()}.{minor.decode()}"
            log.warning("AMX not used: GCC %s compiled llama.cpp; use 12.4, 13.3 or 14", version)
            return True
    return False
