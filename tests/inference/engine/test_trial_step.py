"""The first step of a model, in a copy of the process."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path

import pytest

from bench import embedding_models
from bench.embedding_models import MEAN
from services.contract.messages import Sampling
from services.inference.engine import trial_step
from services.inference.engine.backend import AdapterError, Chunk
from services.inference.engine.llama import Llama
from services.inference.engine.llama_embedder import LlamaEmbedder
from services.inference.engine.llama_model import ModelError
from tests.inference.gguf_files import DEMO, Value, changed_demo
from tests.inference.lora import write_lora


def loaded(path: Path, threads: int = 2) -> Llama:
    return Llama(
        path, context=128, parallel=1, threads=threads, gpu_layers=0, on_progress=lambda _: True
    )


def test_step_of_a_sound_model_changes_nothing() -> None:
    model = loaded(DEMO)
    try:
        sampler = model.sampler(Sampling(temperature=0.0))
        chunk = Chunk(0, 0, model.tokenize("Once upon", special=False), sampler)
        before = model.decode([chunk])  # starts the threads, which a fork does not have
        model.truncate(0, 0)
        trial_step.run(model, "demo")
        assert model.length(0) == 0
        assert model.decode([chunk]) == before
    finally:
        model.close()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention__layer_norm_rms_epsilon", nan, r"SIGABRT: GGML_ASSERT\(eps >= 0"),
        ("attention__layer_norm_rms_epsilon", -1.0, r"SIGABRT: GGML_ASSERT\(eps >= 0"),
        ("rope__freq_base", nan, "computed NaN"),
        ("rope__freq_base", -1.0, "computed NaN"),
        ("rope__freq_base", 0.0, "computed NaN"),
        ("rope__scaling__factor", nan, "computed NaN"),
        ("rope__scaling__attn_factor", nan, "computed NaN"),
    ],
)
def test_unusable_number_in_a_file_is_an_error(
    tmp_path: Path, key: str, value: Value, reason: str
) -> None:
    model = loaded(changed_demo(tmp_path / "mine.gguf", **{f"llama__{key}": value}))
    try:
        with pytest.raises(ModelError, match=f"mine is damaged, or .* first step .*{reason}"):
            trial_step.run(model, "mine")
        assert model.length(0) == 0  # the worker stays
    finally:
        model.close()


def test_embedder_is_tried_by_a_step(tmp_path: Path) -> None:
    shape = embedding_models.TINY._replace(context=128)
    path = embedding_models.write("bert", tmp_path / "e.gguf", shape, MEAN)
    data = bytearray(path.read_bytes())
    key = b"bert.attention.layer_norm_epsilon"
    start = data.index(key) + len(key) + 4
    data[start : start + 4] = b"\x00\x00\xc0\x7f"  # NaN
    (tmp_path / "nan.gguf").write_bytes(data)
    for each, fails in ((path, False), (tmp_path / "nan.gguf", True)):
        embedder = LlamaEmbedder(
            each, context=128, threads=2, gpu_layers=0, on_progress=lambda _: True
        )
        try:
            if fails:
                with pytest.raises(ModelError, match=r"SIGABRT: GGML_ASSERT"):
                    trial_step.run(embedder, "mine")
            else:
                trial_step.run(embedder, "mine")
        finally:
            embedder.close()


def test_adapter_is_tried_apart_from_running_steps(tmp_path: Path) -> None:
    good = write_lora(tmp_path / "good.gguf")
    bad = write_lora(tmp_path / "bad.gguf", metadata={"adapter.lora.alpha": nan})
    model = loaded(DEMO)
    try:
        model.try_adapter(good)
        sampler = model.sampler(Sampling(temperature=0.0))
        chunk = Chunk(0, 0, model.tokenize("Once upon", special=False), sampler)
        expected, is_tried, steps = model.decode([chunk]), threading.Event(), 0
        with ThreadPoolExecutor(1) as pool:
            trying = pool.submit(model.try_adapter, bad)
            trying.add_done_callback(lambda _: is_tried.set())
            while not is_tried.is_set() or not steps:
                model.truncate(0, 0)
                assert model.decode([chunk]) == expected
                steps += 1
            with pytest.raises(AdapterError, match=r"bad\.gguf can't be used .*NaN with it"):
                trying.result()
    finally:
        model.close()


def test_adapter_with_an_absurd_header_is_refused(tmp_path: Path) -> None:
    data = write_lora(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:8] + b"\xff" * 8 + data[16:])
    model = loaded(DEMO)
    try:
        with pytest.raises(AdapterError, match=r"damaged or incomplete \(it claims to have 18,44"):
            model.load_adapter(1, tmp_path / "a.gguf")
    finally:
        model.close()


def test_worker_goes_on_where_it_can_not_fork(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    model = loaded(DEMO)
    try:
        trial_step.run(model, "demo")
    finally:
        model.close()
    assert "model not tried by a step" in caplog.text
