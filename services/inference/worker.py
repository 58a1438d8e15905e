"""The worker: loads its model, serves requests once that is ready, and reports its state."""

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal
from uuid import uuid4

from prometheus_client.core import Metric

from services.client.routing import WorkerDirectory
from services.contract.messages import ModelInfo, ModelKind, WorkerReport
from services.inference import models
from services.inference.chat_service import ChatService
from services.inference.embedding_service import EmbeddingService
from services.inference.engine.llama_model import ModelError
from services.inference.engine.scheduling.prefill_budget import Throughput
from services.inference.limits import InferenceLimits
from services.inference.model_path import model_name, printable, sentence
from services.inference.models import LoadedEmbedder, LoadedModel
from services.inference.report_hub import ReportHub
from services.inference.settings import InferenceSettings
from services.inference.state_folder import StateFolder
from services.inference.tokens import TokenService
from services.runtime.bus import Bus
from services.runtime.metrics import serving_metrics, worker_families
from services.runtime.process import Process
from services.runtime.supervised import SupervisedLoop

log = logging.getLogger(__name__)


class Worker:
    """A worker that can't load its model keeps running, reports why, and accepts no requests."""

    def __init__(self, bus: Bus, settings: InferenceSettings, process: Process) -> None:
        self._bus = bus
        self._settings = settings
        self._limits = InferenceLimits(bus.max_payload)
        self._process = process
        folder = settings.model_cache_folder
        self._folder = StateFolder(Path(folder), settings.model_path) if folder else None
        self._taken = self._folder.take() if self._folder else None
        # under the same id, requests of the cached conversations are routed here
        self._id = self._taken.worker_id if self._taken else uuid4().hex
        self._state: Literal["loading", "ready", "draining", "failed"] = "loading"
        self._progress = 0.0
        self._last_logged = time.monotonic()
        self._error: str | None = None
        self._name = printable(", ".join(model_name(Path(p)) for p in settings.model_paths))
        self._model: ModelInfo | None = None
        self._kind: ModelKind = "chat"
        self._service: ChatService | EmbeddingService | None = None
        self._tokens: TokenService | None = None
        self._workers = WorkerDirectory()
        self._reports = ReportHub(bus, self._id, self._workers)
        self._report_interval = self._reports.report_interval
        self._reporting = AsyncExitStack()

    async def start(self) -> None:
        """Start loading the model, and return at once: it may take minutes."""
        host, port = self._settings.metrics_host, self._settings.inference_metrics_port
        metrics = serving_metrics(self._bus, host, port, "INFERENCE_METRICS_PORT", self._metrics)
        self._process.stack.enter_context(metrics)
        await self._reporting.enter_async_context(self._reports.running(self._process.fail))
        loop = SupervisedLoop("report", self._report_step, self._process.fail)
        await self._reporting.enter_async_context(loop.running(is_cancelled=True))
        self._loading = self._bus.spawn(self._load())

    async def drain(self) -> None:
        self._state = "draining"
        await self._report()
        await self._loading
        if self._tokens:
            await self._tokens.close()
        if self._service:
            await self._service.drain()
        await self._reporting.aclose()
        kept = self._service.kept if isinstance(self._service, ChatService) else None
        if self._folder and kept:
            seconds = self._limits.save_seconds
            await asyncio.to_thread(self._folder.write, self._id, kept, seconds)

    async def _load(self) -> None:
        try:
            model = await asyncio.to_thread(
                models.load, self._settings, self._on_progress, self._on_found
            )
        except ModelError as error:
            self._fail_to_load(str(error))
            return
        except Exception:
            log.exception("model load failed")
            self._fail_to_load("The model can't be loaded: see the worker's log.")
            return
        self._model = model.info
        log.info(
            "model loaded name=%s kind=%s context=%d device=%s",
            model.info.name,
            self._kind,
            model.info.context,
            "gpu" if model.on_gpu else "cpu",
        )
        try:
            await self._serve(model)
        except Exception:
            log.exception("start failed")
            self._process.fail("the worker can't serve requests")
            return
        if self._state == "loading":
            self._state = "ready"
        await self._report()

    async def _serve(self, model: LoadedModel | LoadedEmbedder) -> None:
        fail = self._process.fail
        if isinstance(model, LoadedEmbedder):
            if self._taken:
                self._taken.close()
            self._service = EmbeddingService(
                self._bus,
                self._settings,
                self._limits,
                self._id,
                model,
                self._workers,
                self._reports,
                fail,
            )
        else:
            self._error = model.no_chat_reason
            self._service = ChatService(
                self._bus,
                self._settings,
                self._limits,
                self._id,
                model,
                self._workers,
                self._reports,
                fail,
                on_adapters_changed=lambda: self._bus.spawn(self._report()),
                taken=self._taken,
            )
            self._tokens = TokenService(self._bus, self._id, model, self._limits)
            await self._tokens.start()
        await self._service.start()

    def _on_found(self, name: str, kind: ModelKind) -> None:
        """Runs in the loading thread."""
        self._name, self._kind = printable(name), kind

    def _on_progress(self, share: float) -> bool:
        """Runs in the loading thread. Return False, which aborts loading, once draining."""
        if time.monotonic() - self._last_logged >= self._limits.load_log_interval_seconds:
            self._last_logged = time.monotonic()
            log.info("loading model progress=%d%%", share * 100)
        self._progress = share
        return self._state != "draining"

    def _fail_to_load(self, reason: str) -> None:
        if self._taken:
            self._taken.close()
        if self._state != "draining":
            self._state, self._error = "failed", sentence(reason)
            log.error("%s", self._error)

    async def _report_step(self) -> float:
        self._report_interval = self._reports.report_interval
        await self._report()
        return self._report_interval

    async def _report(self) -> None:
        await self._reports.report(self._make_report())

    def _metrics(self) -> Iterable[Metric]:
        """Runs in the thread that serves metrics."""
        return worker_families([self._make_report()])

    def _make_report(self) -> WorkerReport:
        service, limits = self._service, self._limits
        throughput = service.throughput if service else Throughput()
        return WorkerReport(
            worker_id=self._id,
            state=self._state,
            slots=self._settings.model_parallel,
            running=service.running if service else 0,
            waiting=service.waiting if service else 0,
            queue=self._settings.model_queue,
            queued_tokens=service.queued_tokens if service else 0,
            tokens_per_second=round(throughput.tokens_per_second, 1),
            prefilled_tokens=throughput.prefilled_tokens,
            generated_tokens=throughput.generated_tokens,
            progress=round(self._progress, 3),
            model=service.model_info if service else self._model,
            error=self._error,
            name=self._name,
            default_model=self._settings.model_default,
            adapter_faults=service.adapter_faults[: limits.max_reported_faults] if service else (),
            kind=self._kind,
            dimensions=service.dimensions if service else 0,
            interval=self._report_interval,
        )
