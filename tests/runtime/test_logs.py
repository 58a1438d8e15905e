import asyncio
import logging

import pytest

from services.runtime import logs


async def test_each_line_has_the_id_of_the_request_that_it_is_about(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure("edge")

    async def handle(request_id: str) -> None:
        logs.request_id.set(request_id)
        await asyncio.sleep(0)
        logging.info("for %s", request_id)

    await asyncio.gather(handle("r1"), handle("r2"))
    logging.info("for nobody")
    root.handlers[:], root.level = before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "INFO    edge      [r1] for r1" in lines[0]
    assert "[r2] for r2" in lines[1]
    assert "[-] for nobody" in lines[2]
