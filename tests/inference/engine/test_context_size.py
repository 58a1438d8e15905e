"""Choice of the context window by memory."""

import logging

import pytest

from services.inference.engine.context_size import (
    bound_host_cache,
    choose,
    model_memory,
    warn_of_shortage,
)
from services.inference.engine.memory import Memory
from services.inference.engine.trial import AUTO_CONTEXTS, ContextNeed, Trial

GIB = 2**30
MIB = 2**20
WEIGHTS = 2 * GIB


def model(trained: int = 131072, layers: int = 32) -> Trial:
    """A model whose KV cache takes 1 GiB per 4,096 tokens, with buffers of a quarter GiB."""
    sizes = sorted({min(tokens, trained) for tokens in AUTO_CONTEXTS})
    needs = (ContextNeed(tokens, tokens * GIB // 4096, GIB // 4, 0) for tokens in sizes)
    return Trial(trained, layers, tuple(needs))


@pytest.mark.parametrize(
    ("free", "cache", "tokens", "limit"),
    [
        (100, 4, 32768, "maximum"),
        (2 + 33, 4, 32768, "maximum"),  # 8 + 0.25 GiB are a quarter of what the weights leave
        (2 + 32.9, 4, 16384, "memory"),
        (2 + 17, 12.7, 16384, "memory"),
        (2 + 17, 13, 8192, "memory"),  # the host KV cache leaves less than a quarter
        (2 + 3, 0, 2048, "memory"),
        (3, 4, 2048, "memory"),  # nothing fits: the smallest, as before
        (1, 0, 2048, "memory"),
    ],
)
def test_largest_context_within_the_host_budget_is_chosen(
    free: float, cache: float, tokens: int, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    trial = model()
    beside = model_memory(Memory(int(free * GIB)), WEIGHTS, int(cache * GIB), -1, trial)
    with caplog.at_level(logging.INFO):
        assert choose(trial, beside) == tokens
    (line,) = caplog.messages
    assert line.startswith(f"context chosen tokens={tokens} limit={limit} host_need_mib=")
    assert "gpu" not in line


@pytest.mark.parametrize("trained", [64, 2048, 5000, 20000])
def test_context_of_the_model_is_chosen_if_it_fits(
    trained: int, caplog: pytest.LogCaptureFixture
) -> None:
    trial = model(trained)
    with caplog.at_level(logging.INFO):
        assert choose(trial, model_memory(Memory(64 * GIB), WEIGHTS, 0, -1, trial)) == trained
    assert "limit=model" in caplog.text


@pytest.mark.parametrize(
    ("layers", "gpu", "host", "tokens"),
    [
        (-1, 2 + 10.1, 1, 32768),  # 8 GiB are 80 % of the rest; the host needs nothing
        (33, 2 + 10.1, 1, 32768),
        (-1, 2 + 9.9, 100, 16384),
        (17, 1 + 5.1, 1 + 16.6, 32768),  # half here, half there
        (17, 1 + 5.1, 1 + 16.4, 16384),
        (17, 1 + 4.9, 1 + 16.6, 16384),
        (0, 100, 2 + 17, 16384),
    ],
)
def test_kv_cache_of_offloaded_layers_must_fit_the_gpu(
    layers: int, gpu: float, host: float, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    trial = model()
    free = Memory(int(host * GIB), int(gpu * GIB))
    with caplog.at_level(logging.INFO):
        assert choose(trial, model_memory(free, WEIGHTS, 0, layers, trial)) == tokens
    assert "gpu_need_mib=" in caplog.text


def test_gpu_buffers_in_shared_memory_count_for_the_host() -> None:
    """Apple's GPUs and integrated ones use the memory of the host."""
    need = ContextNeed(2048, GIB, GIB, GIB)
    trial = Trial(2048, 32, (need,))
    beside = model_memory(Memory(10 * GIB), WEIGHTS, 0, -1, trial)
    assert beside.need(need) == Memory(3 * GIB, 0)
    assert beside.free == Memory(8 * GIB, 0)


@pytest.mark.parametrize(("free", "warns"), [(2 + 8.3, False), (2 + 8.2, True), (1, True)])
def test_context_larger_than_the_memory_is_warned_of(
    free: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trial = Trial(131072, 32, model().needs[-1:])
    beside = model_memory(Memory(int(free * GIB)), WEIGHTS, 4 * GIB, -1, trial)
    warn_of_shortage(trial, 32768, beside)
    assert ("lower MODEL_CONTEXT or MODEL_PARALLEL" in caplog.text) is warns


@pytest.mark.parametrize(
    ("free", "setting_mib", "bound_mib"),
    [
        (2 + 0.75 + 4.3, 4096, 4096),  # 2,048 tokens take 0.75 GiB, and the worker 0.3
        (2 + 0.75 + 2.3, 4096, 2055),
        (2 + 0.75, 4096, 256),
        (1, 4096, 256),
        (1, 100, 100),
        (1, 0, 0),
    ],
)
def test_host_cache_takes_what_the_context_leaves(
    free: float, setting_mib: int, bound_mib: int, caplog: pytest.LogCaptureFixture
) -> None:
    trial = model()
    beside = model_memory(Memory(int(free * GIB)), WEIGHTS, setting_mib * MIB, -1, trial)
    with caplog.at_level(logging.INFO):
        assert bound_host_cache(trial, 2048, beside) // MIB == bound_mib
    expected = f"host KV cache bounded by memory mib={bound_mib} setting_mib={setting_mib}"
    assert caplog.messages == ([expected] if bound_mib < setting_mib else [])
