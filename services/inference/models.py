"""
Which GGUF file to serve, with which adapters, and everything that can be wrong with them, in one
sentence each.
"""

import hashlib
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo
from services.inference.engine.backend import Backend
from services.inference.engine.llama import Llama, ModelError
from services.inference.engine.template import ChatTemplate, TemplateError
from services.inference.settings import InferenceSettings

log = logging.getLogger(__name__)

MODELS = Path("model")
ADAPTERS = "adapters"  # the folder beside a model's file, with one for each model's own in it
DEMO = "demo.gguf"
MIB = 2**20


class Model(NamedTuple):
    """A model that is ready to serve."""

    info: ModelInfo
    backend: Backend
    template: ChatTemplate
    served: tuple[ModelInfo, ...]  # the model as it is, then with each of its adapters

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


def load(settings: InferenceSettings, on_progress: Callable[[float], bool]) -> Model:
    """Takes seconds to minutes; ends when `on_progress` returns False. Raises ModelError."""
    path = find(settings.model_path, MODELS)
    _check_is_gguf(path)
    adapters = _adapters(path)
    for file in (path, *adapters):
        log.info("loading %s, %d MB", file, file.stat().st_size // 10**6)
    llama = Llama(
        path,
        context=settings.model_context,
        parallel=settings.model_parallel,
        threads=settings.threads,
        gpu_layers=settings.model_gpu_layers,
        on_progress=on_progress,
        adapters=adapters,
    )
    try:
        template = _template(path, llama)
    except ModelError:
        llama.close()
        raise
    base = ModelInfo(path.stem, _digest(path), llama.context, path.stat().st_size)
    changed = int(path.stat().st_mtime)
    info = replace(base, adapters=tuple(file.stem for file in adapters), changed=changed)
    served = (base, *(_adapted(base, file) for file in adapters))
    return Model(info, llama, template, served)


def _adapters(path: Path) -> list[Path]:
    """Those for any model in its folder, and those for it alone. Raises ModelError."""
    folder = path.parent / ADAPTERS
    found = sorted(
        (*folder.glob("*.gguf"), *(folder / path.stem).glob("*.gguf")), key=lambda path: path.stem
    )
    for one, other in pairwise(found):
        if one.stem == other.stem:
            raise ModelError(f"{one} and {other} have the same name: rename one of them.")
    return found


def find(model_path: str, folder: Path) -> Path:
    """MODEL_PATH, or the one .gguf in the folder, or the demo model. Raises ModelError."""
    if model_path:
        return Path(model_path)
    own = sorted(path for path in folder.glob("*.gguf") if path.name != DEMO)
    if len(own) > 1:
        names = ", ".join(path.name for path in own)
        raise ModelError(f"{folder}/ holds several models ({names}): name one with MODEL_PATH.")
    return own[0] if own else folder / DEMO


def _check_is_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(
            f"{path} can't be read ({error.strerror}): put a .gguf file into model/, or set"
            " MODEL_PATH."
        ) from error
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file: convert the model with llama.cpp's convert_hf_to_gguf.py."
        )


def _template(path: Path, llama: Llama) -> ChatTemplate:
    source = llama.template
    if source is None:
        raise ModelError(
            f"{path} carries no chat template: convert it from a model whose"
            " tokenizer_config.json has a chat_template."
        )
    try:
        return ChatTemplate(source, llama, bos=llama.bos, eos=llama.eos, adds_bos=llama.adds_bos)
    except TemplateError as error:
        raise ModelError(f"{path} has a chat template that can't be used: {error}.") from error


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
