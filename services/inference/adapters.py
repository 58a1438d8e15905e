"""
The LoRA adapters of the served model: which ones requests can name, and the folder they come from.

The folder is the interface: a file that is put into it, replaced or removed is noticed within a
second, without a restart. Answers that run finish with the version that they began with.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo
from services.contract.model_names import choose_adapter, with_scale
from services.inference.engine.adapter_numbers import BASE, adapter_number, file_of
from services.inference.engine.backend import AdapterError
from services.inference.engine.engine import Engine
from services.inference.model_files import AdapterFiles, FileState, file_state, find_adapters
from services.inference.model_path import sentence

log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """The model as a request names it: plain, or with one version of an adapter at a scale."""

    number: int  # of the adapter in the engine
    info: ModelInfo

    @property
    def adapter_digest(self) -> str:
        """Digest of the model with its adapter; "" for the plain model."""
        return "" if self.number == BASE else self.info.digest


class _Adapter(NamedTuple):
    file: int  # its number in the engine
    digest: str


class Adapters:
    """
    The adapters that requests can name, and those that answers in progress still use. Not
    thread-safe. `free` gets the number of a file that is neither.
    """

    def __init__(self, base: ModelInfo, free: Callable[[int], object]) -> None:
        self._base = Variant(BASE, base)
        self._free = free
        self._by_name: dict[str, _Adapter] = {}  # `<model>:<adapter>`
        self._leases: Counter[int] = Counter()  # by file

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names without the model's, sorted."""
        start = len(self._full_name(""))
        return tuple(name[start:] for name in sorted(self._by_name))

    def find(self, model: str | None) -> Variant:
        """
        Return what a request names; the plain model without a name. Raises ServiceError:
        model_not_found, or invalid_request for an invalid scale.
        """
        base = self._base
        if model is None or model == base.info.name:
            return base
        choice = choose_adapter(model, self._by_name)
        if choice is None:
            available = ", ".join([base.info.name, *sorted(self._by_name)])
            raise ServiceError(
                "model_not_found", f"There is no model {model!r}; available: {available}."
            )
        adapter, name = self._by_name[choice.name], with_scale(*choice)
        scale = name.removeprefix(choice.name)  # "" for 1, so that it has the adapter's digest
        digest = hashlib.sha256((base.info.digest + adapter.digest + scale).encode()).hexdigest()
        number = adapter_number(adapter.file, choice.scale)
        return Variant(number, replace(base.info, name=name, digest=digest))

    def lease(self, variant: Variant) -> None:
        """Keep the variant's adapter until `release`."""
        self._leases[file_of(variant.number)] += 1

    def release(self, variant: Variant) -> None:
        file = file_of(variant.number)
        self._leases[file] -= 1
        self._free_if_unused(file)

    def is_loaded(self, variant: Variant) -> bool:
        """Return whether the engine still has the variant's adapter."""
        file = file_of(variant.number)
        return file == BASE or self._leases[file] > 0 or self._is_named(file)

    def digest(self, name: str) -> str | None:
        """Return the digest of an adapter's file; None if there is no such adapter."""
        adapter = self._by_name.get(self._full_name(name))
        return adapter.digest if adapter else None

    def put(self, name: str, file: int, digest: str) -> None:
        """Let requests name an adapter that the engine has loaded; it replaces an older version."""
        self.remove(name)
        self._by_name[self._full_name(name)] = _Adapter(file, digest)

    def remove(self, name: str) -> None:
        if adapter := self._by_name.pop(self._full_name(name), None):
            self._free_if_unused(adapter.file)

    def _full_name(self, name: str) -> str:
        return f"{self._base.info.name}:{name}"

    def _is_named(self, file: int) -> bool:
        return any(adapter.file == file for adapter in self._by_name.values())

    def _free_if_unused(self, file: int) -> None:
        if self._leases[file] > 0 or self._is_named(file):
            return
        del self._leases[file]
        if file != BASE:
            self._free(file)


class _SeenFile(NamedTuple):
    path: Path
    state: FileState


class AdapterFolder:
    """
    Loads the adapters of the folders of `model` (None: there are none), and follows their changes.

    A file is loaded once two looks at it find the same size and time, since it may still be being
    copied; only the first look loads at once. If a file can't be used, a sentence in `faults` and
    in the log says why, and the version before it, if there is one, stays.
    """

    def __init__(
        self,
        model: Path | None,
        adapters: Adapters,
        engine: Engine,
        poll_seconds: float,
        on_change: Callable[[], object],
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._engine = engine
        self._poll_seconds = poll_seconds
        self._on_change = on_change
        self._files = count(1)
        self._last: dict[str, _SeenFile] | None = None
        self._tried: dict[str, _SeenFile] = {}
        self._unusable: dict[str, str] = {}  # why, by name
        self.faults: tuple[str, ...] = ()

    async def step(self) -> float:
        """Load what has changed. Return the seconds until the next look (SupervisedLoop)."""
        if self._model is None:
            return self._poll_seconds
        before = self._adapters.names, self.faults
        try:
            seen, faults = await asyncio.to_thread(_look, self._model)
        except OSError as error:
            self._set_faults([f"{error.filename} can't be read: {error.strerror}."])
        else:
            await self._update(seen)
            self._set_faults([*faults, *self._unusable.values()])
        if before != (self._adapters.names, self.faults):
            self._on_change()
        return self._poll_seconds

    async def _update(self, seen: dict[str, _SeenFile]) -> None:
        last = seen if self._last is None else self._last
        self._last = seen
        for name in {*self._tried, *self._unusable} - {*seen, *last}:
            self._tried.pop(name, None)
            self._unusable.pop(name, None)
            if name in self._adapters.names:
                self._adapters.remove(name)
                log.info("adapter removed name=%s", name)
        for name, file in seen.items():
            if file == last.get(name) and file != self._tried.get(name):
                await self._load(name, file)

    async def _load(self, name: str, seen: _SeenFile) -> None:
        self._tried[name] = seen
        try:
            digest = await asyncio.to_thread(_digest, seen.path)
            if digest != self._adapters.digest(name):  # else it was only touched
                await self._load_into_engine(name, seen, digest)
            self._unusable.pop(name, None)
        except AdapterError as error:
            self._unusable[name] = str(error)
        except OSError as error:
            self._unusable[name] = f"{seen.path} can't be read: {error.strerror}."
            del self._tried[name]  # the next look tries again: chmod changes no FileState

    async def _load_into_engine(self, name: str, seen: _SeenFile, digest: str) -> None:
        """Load a version of an adapter. Raises AdapterError or OSError."""
        await asyncio.to_thread(self._engine.try_adapter, seen.path)
        number = next(self._files)
        await asyncio.wrap_future(self._engine.load_adapter(number, seen.path))
        if not await asyncio.to_thread(_is_unchanged, seen):
            self._engine.free_adapter(number)
            raise AdapterError(f"{seen.path} changed while it was loaded: it is loaded again.")
        self._adapters.put(name, number, digest)
        log.info("adapter loaded name=%s path=%s digest=%s", name, seen.path, digest[:12])

    def _set_faults(self, faults: Iterable[str]) -> None:
        """Set the faults, and log the new ones."""
        before, self.faults = self.faults, tuple(map(sentence, faults))
        for fault in self.faults:
            if fault not in before:
                log.warning("%s", fault)


def _look(model: Path) -> tuple[dict[str, _SeenFile], tuple[str, ...]]:
    """Return the adapters by name, sorted, and sentences on other files. Raises OSError."""
    found: AdapterFiles = find_adapters(model)
    seen = {}
    for name, path in sorted(found.files.items()):
        try:
            seen[name] = _SeenFile(path, file_state(path))
        except FileNotFoundError:
            continue  # removed meanwhile
    return seen, found.faults


def _is_unchanged(seen: _SeenFile) -> bool:
    return seen.path.exists() and file_state(seen.path) == seen.state


def _digest(path: Path) -> str:
    """Return the SHA-256 of a whole file: the weights of two versions differ anywhere."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
