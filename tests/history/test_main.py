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


async def test_a_bad_address_ends_the_process_at_once_and_is_named(nats_url: str) -> None:
    async with process(NATS_URL=nats_url, MONGODB_URI="localhost:port") as history:
        _, said = await history.communicate()
        assert history.returncode == 2
    assert b"MONGODB_URI can't be used" in said and b"Traceback" not in said


async def test_on_sigterm_what_was_asked_is_answered(
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
        asked = [asyncio.create_task(context(bus, session_id)) for _ in range(300)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        history.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await history.communicate()
        assert history.returncode == 0
    # those that came after it had left know that at once; none waits for nothing
    assert {type(answer) for answer in answers} <= {Context, NoResponders}
    assert sum(isinstance(answer, Context) for answer in answers) > 1
