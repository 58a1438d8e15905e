"""`python -m services.history`: remembers every session, for as long as NATS (and MongoDB) do."""

from services.history.service import start
from services.history.settings import HistorySettings
from services.runtime.process import Process, run


async def serve(process: Process, settings: HistorySettings) -> None:
    await start(process.stack, settings, process.fail)


if __name__ == "__main__":
    run("history", HistorySettings, serve)
