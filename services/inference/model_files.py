"""
Finds the GGUF file to serve: MODEL_PATH, the only model in the model folder, or the demo model.

Other files that look like a model are explained in an error or a warning, never ignored silently.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from services.contract.messages import ModelKind
from services.contract.version import COMMAND
from services.inference.engine import gguf_header
from services.inference.engine.gguf_header import Header, NotGguf
from services.inference.engine.llama_model import ModelError
from services.inference.model_path import (
    PART,
    expand_home,
    is_printable,
    model_name,
    split_model_path,
)

log = logging.getLogger(__name__)

MODELS = Path("model")
ADAPTERS = "adapters"
"""Folder beside a model's file. A subfolder has the adapters of the model with its name."""
DEMO = "demo.gguf"
BUNDLED_DEMO = Path(__file__).with_name("demo") / DEMO
"""The demo model of an installed package; a clone has it in MODELS."""

_OTHER_FORMATS = (".safetensors", ".ckpt", ".pth", ".ggml")
_RERANKER = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK; 1 to 3 are embeddings of a whole text
_DIFFUSION_LANGUAGE_MODELS = ("dream", "llada", "llada-moe", "rnd1")
_IMAGE_MODELS = (  # of https://github.com/city96/ComfyUI-GGUF and stable-diffusion.cpp
    "aura", "cosmos", "flux", "hidream", "hyvid", "ltxv", "lumina2", "pig", "qwen_image", "sd1",
    "sd3", "sdxl", "wan", "z_image",
)  # fmt: skip
_AUDIO_MODELS = ("pockettts", "qwen3tts", "wavtokenizer-dec", "whisper")
_DRAFT_MODELS = ("dflash", "eagle3", "gemma4-assistant")
_NOT_SERVED = {
    **dict.fromkeys(("t5", "t5encoder"), "an encoder-decoder model (T5), which is not supported"),
    **dict.fromkeys(
        _DIFFUSION_LANGUAGE_MODELS,
        "a diffusion model, which is not supported: it does not generate token by token",
    ),
    **dict.fromkeys(_IMAGE_MODELS, "a model for images or videos: it can't generate text"),
    **dict.fromkeys(_AUDIO_MODELS, "a model for audio: it can't generate text"),
    **dict.fromkeys(
        _DRAFT_MODELS, "a draft model for speculative decoding, which is not supported"
    ),
}
_CUT = re.compile(r"tensor '(.+)' data is not within the file bounds")
_MIXED = re.compile(r"tensors expected but \d+ found|tensor '.+' is duplicated")
_UNKNOWN_ARCHITECTURE = re.compile(r"unknown model architecture: '(.*)'")
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, see model/README.md"


FileState = tuple[int, int, int]


class AdapterFiles(NamedTuple):
    """Adapters by name, and sentences on other files beside them."""

    files: Mapping[str, Path]
    faults: tuple[str, ...]


def find_model(model_path: str, folder: Path, bundled: Path = BUNDLED_DEMO) -> Path:
    """
    Return the model's file, or the first of its parts.

    `model_path` names a file or a folder; empty: `folder`. A folder is searched with its
    subfolders. The demo model is returned only if nothing else there looks like a model; the
    `bundled` one only if `model_path` is empty. Raises ModelError.
    """
    paths = split_model_path(model_path)
    if not paths:
        return _only_model(folder, bundled)
    if len(paths) > 1:
        raise ModelError(
            f"MODEL_PATH names {len(paths)} models, and a worker serves one. `{COMMAND} up` starts"
            " a worker for each; with Compose, add a service for each (docs/models.md)."
        )
    path = expand_home(paths[0])
    if os.path.isdir(path):  # Path.is_dir raises for long names
        return _only_model(path)
    if not os.path.exists(path) and not PART.match(path.name):
        raise ModelError(
            f"Model file not found: MODEL_PATH={model_path}. Set it to a GGUF file or its folder."
        )
    path = parts_of(path)[0]
    if why_not := _why_not_served(path):
        raise ModelError(why_not)
    return path


def parts_of(path: Path) -> tuple[Path, ...]:
    """
    Return all parts of the model that `path` belongs to, in order. Raises ModelError if one is
    missing.
    """
    match = PART.match(path.name)
    if not match:
        return (path,)
    base, _, count, suffix = match.groups()
    found = tuple(
        path.with_name(f"{base}-{number:05}-of-{count}{suffix}")
        for number in range(1, int(count) + 1)
    )
    if missing := [part.name for part in found if not part.exists()]:
        more = f" and {len(missing) - 3:,} more" if missing[3:] else ""
        raise ModelError(
            f"{path} is one of {int(count)} parts of a model, and {', '.join(missing[:3])}{more}"
            f" {'are' if missing[1:] else 'is'} missing: put all parts into one folder."
        )
    return found


def kind_of(path: Path) -> ModelKind:
    """Return what a model is for, as its file says: by pooling, or by attention in both ways."""
    try:
        values = gguf_header.read(path).values
    except (NotGguf, OSError):  # `check_files` and `why_broken` explain it
        return "chat"
    architecture = values.get("general.architecture", "")
    pooling = values.get(f"{architecture}.pooling_type", 0)
    if pooling == _RERANKER:
        return "rerank"
    is_causal = values.get(f"{architecture}.attention.causal", True)
    return "embedding" if pooling or not is_causal else "chat"


def file_state(path: Path) -> FileState:
    """Return a value that changes when the file is written or replaced. Raises OSError."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def find_adapters(path: Path) -> AdapterFiles:
    """
    Find the adapters of all models in the model's folder and in MODELS, and its own. Of two with
    one name, the first is used. Raises OSError if a folder can't be read.
    """
    folders = {path.parent, *([MODELS] if MODELS in path.parents else [])}
    found: dict[str, Path] = {}
    faults = []
    for folder in sorted(folders):
        for place in (folder / ADAPTERS, folder / ADAPTERS / model_name(path)):
            files = _listed(place)
            faults += _why_not_ggufs(files)
            for file in filter(_is_gguf, files):
                if fault := _why_no_adapter(file, found):
                    faults.append(fault)
                else:
                    found[file.stem] = file
    return AdapterFiles(found, tuple(faults))


def _why_no_adapter(file: Path, found: Mapping[str, Path]) -> str | None:
    if not file.is_file():  # opening a pipe would block
        return f"{file} is not a file: remove it from {ADAPTERS}/."
    if not is_printable(file):
        return _invalid_name(file)
    if other := found.get(file.stem):
        return f"{other} and {file} have the same name: rename one of them. The first is used."
    return None


def _invalid_name(file: Path) -> str:
    return f"The name of the file {str(file)!r} is not valid UTF-8: rename it."


def check_files(files: Iterable[Path]) -> None:
    """
    Check that the files have valid names, can be read, and are GGUFs with a sound header. Raises
    ModelError.
    """
    for file in files:
        if not is_printable(file):
            raise ModelError(_invalid_name(file))
        if file.exists() and not file.is_file():  # opening a pipe would block
            raise ModelError(f"{file} is not a file: remove it, or name another one.")
        try:
            with file.open("rb") as opened:
                magic = opened.read(4)
        except PermissionError as error:
            raise ModelError(f"{file} can't be read by this user: run chmod o+r {file}") from error
        except OSError as error:
            raise ModelError(f"{file} can't be read: {error.strerror}.") from error
        if not magic:
            raise ModelError(f"{file} is empty: did its download fail?")
        if magic != gguf_header.MAGIC:
            raise ModelError(f"{file} is not a GGUF file: {_CONVERT}.")
        try:
            gguf_header.read_whole(file)
        except NotGguf as error:
            raise ModelError(_damaged(file, error)) from error


def _damaged(file: Path, error: NotGguf) -> str:
    return f"{file} is damaged or incomplete ({error}): download or copy it again."


def why_broken(parts: Sequence[Path], reason: str) -> str | None:
    """Explain why llama.cpp can't load a model, for which it gave `reason`; None if unknown."""
    if found := _UNKNOWN_ARCHITECTURE.search(reason):
        return (
            f"{parts[0]} has the architecture {found[1]!r}, which this version of llama.cpp does"
            " not support: update FineTuneLLM, or use another model."
        )
    cut = _CUT.search(reason)
    for number, part in enumerate(parts, 1):
        try:
            header = gguf_header.read_whole(part)
        except NotGguf as error:
            return _damaged(part, error)
        if cut and cut[1] in header.tensors:
            return f"{part} is incomplete: download or copy it again."
        if why_foreign := _why_foreign(part, header, number, len(parts)):
            return why_foreign
    if _MIXED.search(reason):
        return f"The parts of {parts[0]} are not of one model: download or copy them again."
    return None


def _why_foreign(part: Path, header: Header, number: int, count: int) -> str | None:
    """Explain a file that is not part `number` of `count`; its metadata counts from 0."""
    own, own_count = (header.values.get(f"split.{key}") for key in ("no", "count"))
    if not isinstance(own, int) or not isinstance(own_count, int):
        return f"{part} is not a part of a split model: rename it." if count > 1 else None
    if (own + 1, own_count) == (number, count) or (count == 1 and own_count < 2):
        return None
    return (
        f"{part} is part {own + 1} of {own_count} by its metadata, not {number} of {count}: put the"
        " parts of one model together, with the names that llama.cpp's gguf-split gave them."
    )


def _only_model(folder: Path, bundled: Path | None = None) -> Path:
    """Return the only model in a folder, else a demo model. Raises ModelError."""
    found = _walk(folder) if folder.exists() else []
    files = [file for file in found if file != folder / DEMO]
    ggufs = _without_later_parts(filter(_is_gguf, files))
    why_not = {file: why for file in ggufs if (why := _why_not_served(file))}
    models = [file for file in ggufs if file not in why_not]
    if chats := [file for file in models if kind_of(file) == "chat"]:
        why_not |= {file: _needs_a_path(file) for file in models if file not in chats}
        models = chats
    if len(models) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in models)
        raise ModelError(
            f"{folder}/ contains several models ({names}): choose one with MODEL_PATH, or several,"
            " separated by commas."
        )
    others = [*why_not.values(), *_why_not_ggufs(files)]
    if models:
        _warn(others)
        return parts_of(models[0])[0]
    if others:
        raise ModelError(" ".join(others[:3]))
    if (folder / DEMO).exists():
        return folder / DEMO
    if bundled and bundled.exists():
        log.warning("%s/ contains no .gguf file, so the demo model is served", folder)
        return bundled
    raise ModelError(f"{folder}/ contains no .gguf file: put one there, or set MODEL_PATH.")


def _needs_a_path(file: Path) -> str:
    """Explain an embedding model or a reranker beside a chat model."""
    return f"{file} can't chat: to serve it, too, add its path to MODEL_PATH, after a comma."


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        log.warning("%s", sentence)


def _walk(folder: Path) -> list[Path]:
    """
    Return all files below a folder, following links, without adapters and hidden files such as
    the `._x.gguf` that macOS writes beside x.gguf. Raises ModelError.
    """

    def on_error(error: OSError) -> None:
        raise ModelError(
            f"{error.filename} can't be read ({error.strerror}): run chmod o+rx {error.filename}"
        ) from error

    found, visited = [], set()
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        if (real := os.path.realpath(place)) in visited:  # a link to a parent
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [each for each in folders if each != ADAPTERS and not each.startswith(".")]
        found += [Path(place, each) for each in names if not each.startswith(".")]
    return sorted(found)


def _listed(folder: Path) -> list[Path]:
    """Return the visible files of a folder, sorted; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _is_gguf(file: Path) -> bool:
    return file.suffix.lower() == ".gguf"


def _without_later_parts(files: Iterable[Path]) -> Sequence[Path]:
    """Return the first file of each model."""
    first: dict[Path, Path] = {}
    for file in files:
        first.setdefault(file.with_name(model_name(file)), file)
    return list(first.values())


def _why_not_served(file: Path) -> str | None:
    """Explain a GGUF that is not a model which can be served; None if it may be one."""
    try:
        header = gguf_header.read(file)
    except (NotGguf, OSError):  # `check_files` and `why_broken` explain it if it is to be served
        header = Header({}, 1)
    values = header.values
    architecture, kind = str(values.get("general.architecture", "")), values.get("general.type")
    if kind == "adapter" or "adapter.type" in values:
        folder = MODELS if MODELS in file.parents else file.parent  # where find_adapters looks
        return f"{file} is a LoRA adapter: move it into {folder / ADAPTERS}/."
    if kind == "mmproj" or architecture == "clip" or file.name.lower().startswith("mmproj"):
        return f"{file} is a projector for images, which are not supported: it is not used."
    if kind == "imatrix":
        return f"{file} is an importance matrix for quantizing, not a model: it is not used."
    if architecture in _NOT_SERVED:
        return f"{file} is {_NOT_SERVED[architecture]}."
    if not header.tensor_count and not PART.match(file.name):
        return f"{file} has a vocabulary but no weights: it is not a model."
    return None


def _why_not_ggufs(files: Iterable[Path]) -> list[str]:
    """Explain models in other formats, once per folder, since they often have many files."""
    found = {file.parent: why for file in files if (why := _why_not_gguf(file))}
    return list(found.values())


def _why_not_gguf(file: Path) -> str | None:
    """Explain a model in another format, or an incomplete GGUF; None for other files."""
    lower = file.name.lower()
    if lower.startswith("adapter_model."):
        return f"{file} is a LoRA adapter: convert it with llama.cpp's convert_lora_to_gguf.py."
    if lower.endswith(_OTHER_FORMATS) or lower.startswith("pytorch_model"):
        return f"{file} is not a GGUF file: {_CONVERT}."
    if ".gguf." in lower:
        return f"{file} is not a .gguf file: finish its download, or unpack it."
    return None
