"""python -m services.inference: one worker."""

from services.runtime.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before the other imports: they take a second, and this may start again

from services.inference.settings import InferenceSettings
from services.inference.worker import Worker
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.process import Process, run


async def serve(process: Process, settings: InferenceSettings) -> None:
    bus = await process.stack.enter_async_context(
        Bus.connect(settings.nats_url, "inference", NatsAccess.of(settings))
    )
    worker = Worker(bus, settings, process)
    process.stack.push_async_callback(worker.drain)
    await worker.start()


if __name__ == "__main__":
    run("inference", InferenceSettings, serve)
