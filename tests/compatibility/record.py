"""
Record what a version stores and sends, for the tests of later versions:

    python -m tests.compatibility.record COMMIT

Writes a folder with a backup of its streams, its messages on the bus, and what it shows of its
sessions.
"""

import argparse
import asyncio
import json
import re
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deploy.backup import UNREAD_CHUNKS, StreamBackup
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.e2e.stack import NO_MONGO, Stack
from tests.faults.upgrade import check_out
from tests.servers import ROOT, nats_server

FOLDER = Path(__file__).with_name("recorded")
PROMPTS = {
    "names": ("my name is Ada", "what is my name?"),
    "numbers": ("count to 5",),
    "cleared": ("hello",),
    "erased": ("hello",),
}
IDS = re.compile(r"[0-9a-f]{16,}|[A-Za-z0-9_-]{22,}")


class Recorder:
    """The first messages of each kind on the bus, told apart by subject, verb and type of event."""

    def __init__(self) -> None:
        self.messages: dict[str, dict[str, str]] = {}

    def on_message(self, delivery: Delivery) -> None:
        subject = delivery.subject
        if not subject.startswith(("chat.", "history.", "embed.")) or not delivery.data:
            return
        kind = IDS.sub("*", subject)
        event = re.search(rb'"type":"(\w+)"', delivery.data)
        kind += f" {event.group(1).decode()}" if event else ""
        self.messages.setdefault(kind, {"subject": subject, "data": delivery.data.decode()})


def use(stack: Stack) -> dict[str, Any]:
    """Use what the version has. Return what it shows of its sessions."""
    http = stack.http
    for session, prompts in PROMPTS.items():
        for prompt in prompts:
            assert stack.chat(prompt, session).end["done"]
    http.patch("/sessions/names", json={"title": "Names"}).raise_for_status()
    http.post("/clear-history", params={"session_id": "cleared"}).raise_for_status()
    http.delete("/sessions/erased").raise_for_status()
    # newer routes, which the version may lack
    http.post("/v1/responses", json={"model": "demo", "input": "hello", "temperature": 0})
    message = stack.messages("numbers")[0]
    http.put(f"/sessions/numbers/messages/{message['id']}/feedback", json={"rating": "up"})
    shown = {session: stack.messages(session) for session in PROMPTS}
    return {"messages": shown, "sessions": http.get("/sessions").json()["sessions"]}


def record(checkout: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as path, ExitStack() as cleanup:
        settings = {"MODEL_PATH": str(ROOT / "model/demo.gguf")}
        stack = Stack(Path(path), NO_MONGO, False, nats_server(Path(path)), **settings)
        for part in stack.parts:
            if part is not stack.nats:
                part.folder = checkout
            cleanup.callback(part.stop, signal.SIGKILL)
            part.start()
        stack.wait_until_ready()
        asyncio.run(_record(stack, folder))


async def _record(stack: Stack, folder: Path) -> None:
    url, recorder = f"nats://127.0.0.1:{stack.nats.port}", Recorder()
    async with Bus.connect(url, "recorder", inbox_limits=UNREAD_CHUNKS) as bus:
        await bus.subscribe(">", recorder.on_message)
        shown = await asyncio.to_thread(use, stack)
        await asyncio.sleep(2)  # reports come each second, and history saves snapshots
        await StreamBackup(bus, folder).create()
    lines = (json.dumps(message) for message in recorder.messages.values())
    (folder / "messages.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "shown.json").write_text(json.dumps(shown, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commit")
    commit = parser.parse_args().commit
    folder = FOLDER / commit
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as path:
        check_out(commit, Path(path))
        record(Path(path), folder)


if __name__ == "__main__":
    main()
