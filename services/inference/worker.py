"""
The worker as a whole: loads its model beside all else, serves once it is there, tells all how it
is.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from typing import Literal
from uuid import uuid4

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.messages import ModelInfo, WorkerReport
from services.inference import models
from services.inference.engine.llama import ModelError
from services.inference.service import ChatService
from services.inference.settings import InferenceSettings
from services.inference.tokens import TokenService
from services.runtime.bus import Bus
from services.runtime.process import Process
from services.runtime.supervised import SupervisedLoop

REPORT_EVERY = 1.0  # seconds
TELL_EVERY = 2.0  # seconds between two lines of the log about a model that takes its time

log = logging.getLogger(__name__)


class Worker:
    """A worker whose model can't be loaded stays, reports why, and takes no requests."""

    def __init__(self, bus: Bus, settings: InferenceSettings, process: Process) -> None:
        self._bus = bus
        self._settings = settings
        self._process = process
        self._id = uuid4().hex
        self._state: Literal["loading", "ready", "draining", "failed"] = "loading"
        self._progress = 0.0
        self._last_told = time.monotonic()
        self._error: str | None = None
        self._model: ModelInfo | None = None
        self._service: ChatService | None = None
        self._tokens: TokenService | None = None
        self._workers = WorkerDirectory()
        self._reporting = AsyncExitStack()

    async def start(self) -> None:
        """Returns at once; the model may take minutes."""
        await self._bus.subscribe(subjects.report(subjects.ANY), self._workers.on_report)
        await self._reporting.enter_async_context(
            SupervisedLoop("report", self._report_again, self._process.fail).running(
                is_cancelled=True
            )
        )
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

    async def _load(self) -> None:
        try:
            model = await asyncio.to_thread(models.load, self._settings, self._on_progress)
        except ModelError as error:
            self._give_up(str(error))
            return
        except Exception:
            log.exception("loading the model")
            self._give_up("The model can't be loaded; the worker's log says why.")
            return
        self._model, self._error = model.info, model.why_no_chat
        log.info("%s is loaded: %d tokens of context", model.info.name, model.info.context)
        self._service = ChatService(
            self._bus, self._settings, self._id, model, self._workers, self._process.fail
        )
        self._tokens = TokenService(self._bus, self._id, model)
        try:
            await self._tokens.open()
            await self._service.start()
        except Exception:
            log.exception("serving")
            self._process.fail("NATS does not take the service")
            return
        if self._state == "loading":
            self._state = "ready"
        await self._report()

    def _on_progress(self, share: float) -> bool:
        """In the loading thread. False, which ends the loading, once the worker is draining."""
        if time.monotonic() - self._last_told >= TELL_EVERY:
            self._last_told = time.monotonic()
            log.info("loading the model: %d %%", share * 100)
        self._progress = share
        return self._state != "draining"

    def _give_up(self, why: str) -> None:
        if self._state != "draining":
            log.error("%s", why)
            self._state, self._error = "failed", why

    async def _report_again(self) -> float:
        await self._report()
        return REPORT_EVERY

    async def _report(self) -> None:
        service = self._service
        report = WorkerReport(
            worker_id=self._id,
            state=self._state,
            slots=self._settings.model_parallel,
            running=service.running if service else 0,
            waiting=service.waiting if service else 0,
            queue=self._settings.model_queue,
            queued_tokens=service.queued_tokens if service else 0,
            tokens_per_second=round(service.tokens_per_second, 1) if service else 0.0,
            progress=round(self._progress, 3),
            model=self._model,
            error=self._error,
        )
        if self._bus.connected:  # a report that comes late is worth nothing
            await self._bus.publish(subjects.report(self._id), report)
