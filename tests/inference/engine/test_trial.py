"""Trials of models in a child process."""

import sys
from pathlib import Path

import gguf
import pytest

from bench import embedding_models
from bench.embedding_models import LAST, MEAN
from bench.hybrid_models import HEAD, TINY, write
from services.inference.engine import trial
from services.inference.engine.backend import FlashAttention, KvType
from services.inference.engine.llama_model import ModelError
from tests.inference.gguf_files import DEMO, Value, changed_demo, split_demo

MIB = 2**20


def tried(
    *files: Path,
    context: int | None = None,
    parallel: int = 2,
    kv_type: KvType = "f16",
    flash_attention: FlashAttention = "auto",
    is_embedding: bool = False,
) -> trial.Trial:
    return trial.run(
        trial.TrialRequest(
            files=tuple(map(str, files)),
            context=context,
            parallel=parallel,
            threads=1,
            gpu_layers=0,
            tensor_split=(),
            main_gpu=None,
            kv_type=kv_type,
            flash_attention=flash_attention,
            is_embedding=is_embedding,
        )
    )


def test_trial_says_what_each_context_needs(tmp_path: Path) -> None:
    long = changed_demo(tmp_path / "long.gguf", llama__context_length=10000)
    result = tried(long)
    assert (result.trained, result.layers) == (10000, 6)
    assert [need.tokens for need in result.needs] == [2048, 4096, 8192, 10000]
    # K and V of 6 layers, 256 values of 2 bytes each, in 2 slots
    assert [need.cache for need in result.needs[:3]] == [12 * MIB * n for n in (2, 4, 8)]
    assert all(need.host > 0 and need.gpu == 0 for need in result.needs)


def test_context_of_a_trial_is_limited_by_the_model() -> None:
    (need,) = tried(DEMO, context=100_000).needs
    assert need.tokens == 2048
    (need,) = tried(DEMO, context=1024).needs
    assert (need.tokens, need.cache) == (1024, 12 * MIB)


@pytest.mark.parametrize(("architecture", "pooling"), [("bert", MEAN), ("qwen3", LAST)])
def test_embedding_model_is_tried_as_such(
    tmp_path: Path, architecture: str, pooling: gguf.PoolingType
) -> None:
    shape = embedding_models.TINY._replace(context=4096)
    path = embedding_models.write(architecture, tmp_path / "e.gguf", shape, pooling)
    small, large = tried(path, is_embedding=True).needs
    assert (small.tokens, large.tokens) == (2048, 4096)
    if architecture == "bert":  # no cache, but attention of all tokens to all others at once
        assert small.cache == large.cache == 0 and large.host > 3 * small.host
    else:  # one cache for the longest input, which is computed in steps
        assert large.cache == 2 * small.cache > 0 and large.host < 2 * small.host


def test_smaller_kv_types_need_less() -> None:
    sizes = [tried(DEMO, kv_type=kind).needs[0].cache for kind in ("f32", "f16", "q8_0", "q4_0")]
    assert [size / sizes[1] for size in sizes] == [2, 1, 17 / 32, 9 / 32]


def test_split_model_is_tried_with_all_parts(tmp_path: Path) -> None:
    assert tried(*split_demo(tmp_path / "mine.gguf")).needs == tried(DEMO).needs


def test_unfit_kv_type_is_refused_with_the_reason(tmp_path: Path) -> None:
    shape: dict[str, Value] = {
        "llama__attention__head_count": 16,
        "llama__attention__head_count_kv": 16,
        "llama__rope__dimension_count": 16,
    }
    small_heads = changed_demo(tmp_path / "small.gguf", **shape)
    assert tried(small_heads).needs
    with pytest.raises(ModelError, match=r"K cache type q8_0 with block size 32 .* MODEL_KV_TYPE"):
        tried(small_heads, kv_type="q8_0")


def test_flash_attention_needs_no_room_for_scores() -> None:
    on, off = (tried(DEMO, flash_attention=each).needs[-1] for each in ("on", "off"))
    assert on.cache == off.cache and on.host < off.host


@pytest.mark.parametrize("layers", [0, 100_000])
def test_file_that_makes_llama_abort_is_an_error(tmp_path: Path, layers: int) -> None:
    path = changed_demo(tmp_path / "mine.gguf", llama__block_count=layers)
    with pytest.raises(ModelError, match=r"mine\.gguf is damaged, or .* aborted \(GGML_ASSERT"):
        tried(path)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ("none", "has no tokenizer"),
        ("llama", "out_of_range"),
        ("x", "unknown tokenizer: 'x'"),
        ("rwkv", "runs without end"),
    ],
)
def test_tokenizer_that_makes_llama_abort_is_an_error(
    tmp_path: Path, tokenizer: str, reason: str
) -> None:
    """A SentencePiece tokenizer without tokens for all bytes aborts at the first "é"."""
    path = changed_demo(tmp_path / "mine.gguf", tokenizer__ggml__model=tokenizer)
    with pytest.raises(ModelError, match=rf"mine\.gguf .*{reason}"):
        tried(path)


def test_killed_trial_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(killed))  # as if the kernel ran out of memory
    with pytest.raises(ModelError, match=r"demo\.gguf was killed by SIGKILL.* memory"):
        tried(DEMO)


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_invalid_context_length_is_an_error(tmp_path: Path, tokens: int) -> None:
    path = changed_demo(tmp_path / "mine.gguf", llama__context_length=tokens)
    with pytest.raises(ModelError, match=rf"context length of {tokens} tokens is invalid"):
        tried(path)


@pytest.mark.parametrize("position", range(4, 1100, 157))
def test_damaged_header_is_an_error(tmp_path: Path, position: int) -> None:
    whole = DEMO.read_bytes()
    damage = b"\xff\xff\xff\x7f" * 16
    (tmp_path / "mine.gguf").write_bytes(
        whole[:position] + damage + whole[position + len(damage) :]
    )
    with pytest.raises(ModelError, match=r"mine\.gguf can't be loaded: "):
        tried(tmp_path / "mine.gguf")


@pytest.mark.parametrize(
    ("architecture", "growing_layers"), [("qwen35", 1), ("lfm2", 2), ("gemma3", 1), ("mamba", 0)]
)
def test_only_layers_with_full_attention_grow_with_the_context(
    tmp_path: Path, architecture: str, growing_layers: int
) -> None:
    """The models have 6 layers; recurrent and sliding-window ones have a state of fixed size."""
    needs = tried(write(architecture, TINY, tmp_path / "tiny.gguf")).needs
    first, last = needs[0], needs[-1]
    assert (first.tokens, last.tokens) == (2048, 32768)
    layer = 2 * 2 * HEAD * 2 * 2  # bytes per token: K and V, 2 heads, 2 bytes, 2 slots
    grown = (last.cache - first.cache) / (last.tokens - first.tokens) / layer
    assert grown == pytest.approx(growing_layers, rel=0.01)
