"""A worker as a whole: what it reports while it loads its model, and if it can't."""

import asyncio
import shutil
from pathlib import Path

import pytest
from gguf import PoolingType

from bench.embedding_models import MEAN, RANK, TINY, write
from services.contract import subjects
from services.contract.codec import decode
from services.contract.messages import WorkerReport
from services.inference.settings import InferenceSettings
from services.inference.worker import Worker
from services.runtime.bus import Bus
from services.runtime.process import Process
from tests.inference.gguf_files import DEMO, changed_demo, split_demo


async def loaded(url: str, settings: InferenceSettings) -> WorkerReport:
    """Return the first report after loading."""
    async with Bus.connect(url, "test") as bus, bus.inbox(subjects.report(subjects.ANY)) as box:
        worker = Worker(bus, settings, Process())
        await worker.start()
        try:
            async with asyncio.timeout(60):
                while True:
                    report = decode((await box.next(10)).data, WorkerReport)
                    if report.state != "loading":
                        return report
        finally:
            await worker.drain()


async def test_worker_reports_its_model_and_context(own_history_url: str, tmp_path: Path) -> None:
    path = changed_demo(tmp_path / "mine.gguf", llama__context_length=3000)
    report = await loaded(own_history_url, InferenceSettings(model_path=str(path)))
    assert (report.state, report.error) == ("ready", None)
    assert report.model and report.model.context == 3000


@pytest.mark.parametrize(
    ("pooling", "kind", "dimensions"), [(MEAN, "embedding", TINY.width), (RANK, "rerank", 0)]
)
async def test_worker_reports_what_its_model_is_for(
    own_history_url: str, tmp_path: Path, pooling: PoolingType, kind: str, dimensions: int
) -> None:
    path = write("bert", tmp_path / "e.gguf", pooling=pooling)
    report = await loaded(own_history_url, InferenceSettings(model_path=str(path)))
    assert (report.state, report.kind, report.dimensions) == ("ready", kind, dimensions)
    assert report.model and (report.model.name, report.model.context) == ("e", TINY.context)


async def test_worker_without_pooling_reports_why(own_history_url: str, tmp_path: Path) -> None:
    path = write("bert", tmp_path / "e.gguf", pooling=None)
    report = await loaded(own_history_url, InferenceSettings(model_path=str(path)))
    assert (report.state, report.kind) == ("failed", "embedding")
    assert report.error and "does not say how to pool" in report.error


def copied(path: Path) -> Path:
    return Path(shutil.copy(DEMO, path))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: split_demo(folder / "a.gguf")[1].unlink(), "a-00002-of-00002.gguf is miss"),
        (lambda folder: (folder / "a.gguf").write_bytes(DEMO.read_bytes()[:-9]), "is incomplete"),
        (lambda folder: changed_demo(folder / "a.gguf", llama__block_count=0), "is damaged, or"),
        (lambda folder: copied(folder / "\udcff.gguf"), "name of the file '"),
        (
            lambda folder: [copied(folder / f"{name}.gguf") for name in "\udcffa"],
            "contains several models (",
        ),
    ],
    ids=["missing part", "truncated", "aborts", "invalid name", "several, one invalid name"],
)
async def test_worker_with_a_broken_model_reports_why(
    own_history_url: str, tmp_path: Path, damage: object, why: str
) -> None:
    assert callable(damage)
    damage(tmp_path)
    report = await loaded(own_history_url, InferenceSettings(model_path=str(tmp_path)))
    assert (report.state, report.model) == ("failed", None)
    assert report.error and why in report.error
