"""`python -m services.history`: remembers every session, for as long as NATS (and MongoDB) do."""

from services.history.service import start
from services.history.settings import HistorySettings
from services.runtime.process import Process, run
from services.runtime.settings import load


async def serve(process: Process) -> None:
    await start(process.stack, load(HistorySettings), process.fail)


if __name__ == "__main__":
    run("history", serve)
