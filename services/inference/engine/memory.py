"""Free memory of this machine, or of the container or service unit that limits this process."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from services.inference.engine.ggml import libggml, load_backends

UNKNOWN_SHARE = 0.5  # of the physical memory, which counts as free where the system doesn't say
_CPU, _GPU, _INTEGRATED_GPU = 0, 1, 2  # GGML_BACKEND_DEVICE_TYPE_…


class Memory(NamedTuple):
    """Free bytes of the host, and of all GPUs with memory of their own."""

    host: int
    gpu: int = 0


def measure() -> Memory:
    return Memory(host_available(), sum(gpus_free()))


def host_available(root: Path = Path("/")) -> int:
    """
    Return the bytes that this process can use without swapping, also under the limits of its
    cgroups (version 2 or 1). `root` has proc/ and sys/.
    """
    free = [*_meminfo(root / "proc/meminfo"), *_cgroup_rests(root)]
    return min(free) if free else int(_physical_memory() * UNKNOWN_SHARE)


def gpus_free() -> list[int]:
    """Return the free bytes of each dedicated GPU; none on Apple's, whose memory is the host's."""
    if sys.platform == "darwin":
        return []
    return [free for kind, free in _devices() if kind == _GPU]


def gpu_count() -> int:
    """Return the number of GPUs that llama.cpp uses; integrated ones only without others."""
    kinds = [kind for kind, _ in _devices()]
    return kinds.count(_GPU) or kinds.count(_INTEGRATED_GPU)


def _devices() -> Iterator[tuple[int, int]]:
    """
    Yield type and free bytes of ggml's devices.
    https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml-backend.h
    """
    load_backends()
    get = libggml.ggml_backend_dev_get
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    for index in range(libggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(get(index))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        yield libggml.ggml_backend_dev_type(device), free.value


def _physical_memory() -> int:
    """Ask ggml, which knows how on every system: its CPU device."""
    return next(free for kind, free in _devices() if kind == _CPU)


def _meminfo(path: Path) -> Iterator[int]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _cgroup_rests(root: Path) -> Iterator[int]:
    """
    Yield what each limit leaves. The kernel takes back the cached files that nobody reads before
    it enforces a limit, so they count as free, as for Kubernetes' working set.
    """
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.exists() else []:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            place, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            place = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        for folder in _with_parents(PurePosixPath(group)):
            yield from _rest(place / folder, *names)


def _with_parents(group: PurePosixPath) -> Iterator[PurePosixPath]:
    """A container may see the path outside of it, but only the group itself, as the root."""
    inner = group.relative_to("/")
    yield from (inner, *inner.parents)


def _rest(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        rest = int(most) - int((folder / used).read_text()) + int(stats.get(cached, 0))
    except (OSError, ValueError):  # the root has no limit, and a group may be hidden
        return
    yield max(0, rest)
