"""`python -m services.history`: stores and serves all sessions; see service.py."""

from services.history.service import start
from services.history.settings import HistorySettings
from services.runtime.process import Process, run


async def serve(process: Process, settings: HistorySettings) -> None:
    await start(process.stack, settings, process.fail)


if __name__ == "__main__":
    run("history", HistorySettings, serve)
