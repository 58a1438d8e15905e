"""Loads the model to serve, with its adapters and its chat template."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo
from services.inference.engine.backend import Backend
from services.inference.engine.llama import Llama, ModelError
from services.inference.engine.prompt import templates
from services.inference.engine.prompt.chat_template import ChatTemplate, NoTemplate
from services.inference.engine.prompt.template_renderer import TemplateError
from services.inference.model_files import MODELS, check, find, model_name, parts_of
from services.inference.model_files import adapters as adapters_of
from services.inference.settings import InferenceSettings

log = logging.getLogger(__name__)

MIB = 2**20


class LoadedModel(NamedTuple):
    """A model that is ready to serve."""

    info: ModelInfo
    backend: Backend
    template: ChatTemplate | NoTemplate
    served: tuple[ModelInfo, ...]  # the model as it is, then with each of its adapters

    @property
    def no_chat_reason(self) -> str | None:
        """Why it can't chat, if it has no chat template."""
        return self.template.reason if isinstance(self.template, NoTemplate) else None

    def adapter(self, name: str | None) -> int:
        """The number of the adapter that is meant. Raises ServiceError(model_not_found)."""
        names = [info.name for info in self.served]
        if name is None:
            return 0
        if name not in names:
            raise ServiceError(
                "model_not_found", f"There is no model {name!r}; there is {', '.join(names)}."
            )
        return names.index(name)


def load(settings: InferenceSettings, on_progress: Callable[[float], bool]) -> LoadedModel:
    """Takes seconds to minutes; ends when `on_progress` returns False. Raises ModelError."""
    path = find(settings.model_path, MODELS)
    parts, adapters = parts_of(path), _adapters(path)
    check(parts)
    files = (*parts, *adapters)
    before = _states(files)
    for file in files:
        log.info("loading %s, %d MB", file, file.stat().st_size // 10**6)
    llama = Llama(
        parts,
        context=settings.model_context,
        parallel=settings.model_parallel,
        threads=settings.threads,
        gpu_layers=settings.model_gpu_layers,
        on_progress=on_progress,
        adapters=adapters,
    )
    try:
        template = _template(path, settings.model_chat_template, llama)
        base = _info(path, parts, llama.context)
        served = (base, *(_adapted(base, file) for file in adapters))
        if _states(files) != before:
            raise ModelError(f"{path} changed while it was loaded: restart once it is copied.")
    except ModelError:
        llama.close()
        raise
    changed = int(max(file.stat().st_mtime for file in parts))
    info = replace(base, adapters=tuple(file.stem for file in adapters), changed=changed)
    return LoadedModel(info, llama, template, served)


def _info(path: Path, parts: Sequence[Path], context: int) -> ModelInfo:
    digests = [_digest(part) for part in parts]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest() if digests[1:] else digests[0]
    size = sum(part.stat().st_size for part in parts)
    return ModelInfo(model_name(path), digest, context, size)


def _states(files: Iterable[Path]) -> list[tuple[int, int, int]]:
    """Return what changes when one of the files is written or replaced."""
    stats = [file.stat() for file in files]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _adapters(path: Path) -> list[Path]:
    """Sorted by name. Raises ModelError."""
    found = sorted(adapters_of(path), key=lambda path: path.stem)
    for one, other in pairwise(found):
        if one.stem == other.stem:
            raise ModelError(f"{one} and {other} have the same name: rename one of them.")
    return found


def _template(path: Path, chosen: str, llama: Llama) -> ChatTemplate | NoTemplate:
    """Return the chat template; `chosen` is MODEL_CHAT_TEMPLATE. Raises ModelError."""
    source = _chosen_template(chosen) if chosen else llama.template
    if source is None:
        why = (
            f"{path} has no chat template, so it can't chat: set MODEL_CHAT_TEMPLATE to a file"
            f" or to the format that it was trained on ({templates.NAMES})."
            " /v1/completions works without one."
        )
        log.warning("%s", why)
        return NoTemplate(why, llama, bos=llama.bos, adds_bos=llama.adds_bos)
    try:
        return ChatTemplate(source, llama, bos=llama.bos, eos=llama.eos, adds_bos=llama.adds_bos)
    except TemplateError as error:
        if chosen:
            raise ModelError(f"MODEL_CHAT_TEMPLATE={chosen} can't be used: {error}.") from error
        raise ModelError(
            f"The chat template of {path} can't be used: {error}. MODEL_CHAT_TEMPLATE can name"
            " another one."
        ) from error


def _chosen_template(chosen: str) -> str:
    """Raises ModelError."""
    try:
        return templates.read(chosen)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"MODEL_CHAT_TEMPLATE={chosen} can't be read ({error}): it must be the path of a Jinja"
            f" file, or one of {templates.NAMES}."
        ) from error


def _adapted(base: ModelInfo, adapter: Path) -> ModelInfo:
    """A model with an adapter is another model."""
    digest = hashlib.sha256((base.digest + _digest(adapter)).encode()).hexdigest()
    return replace(base, name=f"{base.name}:{adapter.stem}", digest=digest)


def _digest(path: Path) -> str:
    """
    SHA-256 of the size and the first and last MiB: tells models apart without reading them
    whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(MIB)
        file.seek(max(0, size - MIB))
        tail = file.read(MIB)
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()
