"""Loads the model to serve and its chat template."""

import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace

from services.contract import prompts
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, ModelInfo, ModelKind, Sampling
from services.inference import model_sampling
from services.inference.engine import context_size, memory, trial, trial_step
from services.inference.engine.backend import UNQUANTIZED, Backend
from services.inference.engine.embedding import Embedder
from services.inference.engine.llama import Llama
from services.inference.engine.llama_embedder import LlamaEmbedder
from services.inference.engine.llama_model import ModelError
from services.inference.engine.prompt import templates
from services.inference.engine.prompt.chat_template import ChatTemplate, NoTemplate, PromptOptions
from services.inference.engine.prompt.template_renderer import TemplateError
from services.inference.loading_turn import loading_turn
from services.inference.model_files import (
    MODELS,
    check_files,
    file_state,
    find_model,
    kind_of,
    parts_of,
    why_broken,
)
from services.inference.model_path import model_name
from services.inference.settings import InferenceSettings

log = logging.getLogger(__name__)

MIB = 2**20


class LoadedModel(NamedTuple):
    """A model that is ready to serve. `path` is its file, beside which its adapters are."""

    info: ModelInfo
    backend: Backend
    template: ChatTemplate | NoTemplate
    sampling: Sampling = Sampling()
    """Parameters that the file recommends."""
    path: Path | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Variables for the chat template, which those of a request override."""
    max_host_cache: int = sys.maxsize
    """Bytes that the memory leaves for the host KV cache."""

    def prompt_options(self, request: ChatRequest) -> PromptOptions:
        """Return what the prompt of a request has beside its messages."""
        return PromptOptions(
            tools=() if request.tool_choice == "none" else request.tools or (),
            tool_results=request.tool_results or (),
            variables=self.template.format.variables(
                request.enable_thinking,
                request.reasoning_effort,
                {**self.template_kwargs, **(request.chat_template_kwargs or {})},
            ),
            prefix=request.prefix,
            continue_final=request.continue_final,
        )

    def public_prefixes(self, system: str) -> list[list[int]]:
        """Return the tokens with which prompts of all callers begin, by default."""
        return self.template.public_prefixes(system, self.prompt_options(ChatRequest()).variables)

    @property
    def on_gpu(self) -> bool:
        return self.backend.on_gpu

    def close(self) -> None:
        self.backend.close()

    @property
    def no_chat_reason(self) -> str | None:
        """Why the model can't chat: it has no chat template. None if it can."""
        return self.template.reason if isinstance(self.template, NoTemplate) else None


class LoadedEmbedder(NamedTuple):
    """An embedding model or a reranker that is ready to serve."""

    info: ModelInfo
    kind: ModelKind
    embedder: Embedder

    @property
    def on_gpu(self) -> bool:
        return self.embedder.on_gpu

    def close(self) -> None:
        self.embedder.close()


def load(
    settings: InferenceSettings,
    on_progress: Callable[[float], bool],
    on_found: Callable[[str, ModelKind], object] = lambda name, kind: None,
) -> LoadedModel | LoadedEmbedder:
    """
    Load the model; takes seconds to minutes. `on_found` gets its name and kind before.
    `on_progress` gets the loaded share from 0 to 1, and aborts loading by returning False. Raises
    ModelError.
    """
    path = find_model(settings.model_path, MODELS)
    kind = kind_of(path)
    on_found(model_name(path), kind)
    parts = parts_of(path)
    check_files(parts)
    before = [file_state(part) for part in parts]
    for file in parts:
        log.info("loading file path=%s megabytes=%d", file, file.stat().st_size // 10**6)
    _check_gpus(settings)
    with loading_turn(lambda: on_progress(0)):
        loaded = (
            _load_chat(settings, path, parts, on_progress)
            if kind == "chat"
            else _load_embedder(settings, path, parts, on_progress, kind)
        )
    if [file_state(part) for part in parts] != before:
        loaded.close()
        raise ModelError(f"{path} changed while it was loaded: restart when it is copied.")
    return loaded


def load_chat_model(
    settings: InferenceSettings, on_progress: Callable[[float], bool]
) -> LoadedModel:
    """Do the same as `load` for a caller that generates text. Raises ModelError."""
    loaded = load(settings, on_progress)
    if isinstance(loaded, LoadedEmbedder):
        loaded.close()
        raise ModelError(f"The model {loaded.info.name!r} can't generate text: choose another one.")
    return loaded


def _load_chat(
    settings: InferenceSettings,
    path: Path,
    parts: Sequence[Path],
    on_progress: Callable[[float], bool],
) -> LoadedModel:
    _check_template_kwargs(settings.chat_template_kwargs)
    if settings.model_flash_attention == "off" and settings.model_kv_type not in UNQUANTIZED:
        raise ModelError(
            f"MODEL_KV_TYPE={settings.model_kv_type} needs flash attention: set"
            " MODEL_FLASH_ATTENTION=auto."
        )
    options = _options(settings) | {
        "parallel": settings.model_parallel,
        "kv_type": settings.model_kv_type,
        "flash_attention": settings.model_flash_attention,
    }
    context, host_cache = _plan_memory(settings, parts, "chat")
    llama = Llama(parts, context=context, on_progress=on_progress, **options)
    try:
        trial_step.run(llama, str(path))
        template = _template(path, settings.model_chat_template, llama)
    except ModelError:
        llama.close()
        raise
    info = replace(_info(path, parts, llama.context), trained_context=llama.trained_context)
    sampling = model_sampling.read(llama.metadata)
    kwargs = settings.chat_template_kwargs
    return LoadedModel(info, llama, template, sampling, path, kwargs, host_cache)


def _load_embedder(
    settings: InferenceSettings,
    path: Path,
    parts: Sequence[Path],
    on_progress: Callable[[float], bool],
    kind: ModelKind,
) -> LoadedEmbedder:
    context, _ = _plan_memory(settings, parts, kind)
    embedder = LlamaEmbedder(parts, context=context, on_progress=on_progress, **_options(settings))
    try:
        trial_step.run(embedder, str(path))
    except ModelError:
        embedder.close()
        raise
    info = replace(_info(path, parts, embedder.context), trained_context=embedder.trained_context)
    return LoadedEmbedder(info, kind, embedder)


def _options(settings: InferenceSettings) -> dict[str, Any]:
    """Return what a trial and models of all kinds have in common."""
    return {
        "threads": settings.threads,
        "gpu_layers": settings.model_gpu_layers,
        "tensor_split": settings.model_tensor_split,
        "main_gpu": settings.model_main_gpu,
    }


def _check_gpus(settings: InferenceSettings) -> None:
    """Check MODEL_MAIN_GPU and MODEL_TENSOR_SPLIT. Raises ModelError."""
    split, main, count = settings.model_tensor_split, settings.model_main_gpu, memory.gpu_count()
    if split and main is not None:
        raise ModelError(
            "MODEL_MAIN_GPU uses one GPU and MODEL_TENSOR_SPLIT several: set only one of them."
        )
    if main is not None and main >= count:
        raise ModelError(
            f"MODEL_MAIN_GPU={main} does not exist: llama.cpp sees {count} GPUs, numbered from 0."
        )
    if len(split) > max(count, 1):
        raise ModelError(
            f"MODEL_TENSOR_SPLIT has {len(split)} shares, but llama.cpp sees {count} GPUs: give"
            " one share for each."
        )


def _plan_memory(
    settings: InferenceSettings, parts: Sequence[Path], kind: ModelKind
) -> tuple[int, int]:
    """
    Return the tokens per slot, and the bytes of the host KV cache. Raises ModelError if a trial of
    the model fails.
    """
    given = settings.model_context if isinstance(settings.model_context, int) else None
    request = trial.TrialRequest(
        files=tuple(map(str, parts)),
        context=given,
        parallel=settings.model_parallel,
        kv_type=settings.model_kv_type,
        flash_attention=settings.model_flash_attention,
        is_embedding=kind != "chat",
        **_options(settings),
    )
    try:
        tried = trial.run(request)
    except ModelError as error:
        raise ModelError(why_broken(parts, str(error)) or str(error)) from error
    beside = context_size.model_memory(
        memory.measure(),
        sum(part.stat().st_size for part in parts),
        settings.model_cache * MIB if kind == "chat" else 0,
        settings.model_gpu_layers,
        tried,
    )
    tokens = given or context_size.choose(tried, beside)
    context_size.warn_of_shortage(tried, tokens, beside)
    return tokens, context_size.bound_host_cache(tried, tokens, beside)


def _info(path: Path, parts: Sequence[Path], context: int) -> ModelInfo:
    digests = [_digest(part) for part in parts]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest() if digests[1:] else digests[0]
    stats = [part.stat() for part in parts]
    size, changed = sum(s.st_size for s in stats), int(max(s.st_mtime for s in stats))
    return ModelInfo(model_name(path), digest, context, size, changed=changed)


def _template(path: Path, setting: str, llama: Llama) -> ChatTemplate | NoTemplate:
    """Return the chat template; `setting` is MODEL_CHAT_TEMPLATE. Raises ModelError."""
    source = _read_template(setting) if setting else llama.template
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
        name = f"MODEL_CHAT_TEMPLATE={setting}" if setting else f"The chat template of {path}"
        raise ModelError(
            f"{name} can't be used: {error}. Set MODEL_CHAT_TEMPLATE to another one."
        ) from error


def _check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    try:
        prompts.check_template_kwargs(kwargs)
    except ServiceError as error:
        raise ModelError(f"CHAT_TEMPLATE_KWARGS can't be used. {error}") from error


def _read_template(setting: str) -> str:
    """Return the Jinja source. Raises ModelError."""
    try:
        return templates.read(setting)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"MODEL_CHAT_TEMPLATE={setting} can't be read ({error}): it must be the path of a Jinja"
            f" file, or one of {templates.NAMES}."
        ) from error


def _digest(path: Path) -> str:
    """Return the SHA-256 of the size and the first and last MiB: a whole model takes too long."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(MIB)
        file.seek(max(0, size - MIB))
        tail = file.read(MIB)
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()
