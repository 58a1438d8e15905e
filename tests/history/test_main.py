import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.contract.history import Context
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from tests.history.samples import context, until
from tests.servers import ROOT, free_port


@asynccontextmanager
async def process(**environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.history",
        cwd=ROOT,
        env=os.environ | environ,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_invalid_mongodb_uri_ends_the_process_and_is_named(nats_url: str) -> None:
    async with process(NATS_URL=nats_url, MONGODB_URI="localhost:port") as history:
        _, stderr = await history.communicate()
        assert history.returncode == 2
    assert b"MONGODB_URI can't be used" in stderr and b"Traceback" not in stderr


async def test_sigterm_answers_requests_in_progress(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    absent = f"mongodb://127.0.0.1:{free_port()}/"
    async with process(NATS_URL=nats_url, MONGODB_URI=absent) as history:

        async def is_up() -> bool:
            try:
                return bool(await context(bus, session_id))
            except NoResponders:
                return False

        await until(is_up)
        requests = [asyncio.create_task(context(bus, session_id)) for _ in range(300)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        history.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*requests, return_exceptions=True)
        await history.communicate()
        assert history.returncode == 0
    # requests sent after the drain fail at once; none waits for its timeout
    assert {type(answer) for answer in answers} <= {Context, NoResponders}
    assert sum(isinstance(answer, Context) for answer in answers) > 1
