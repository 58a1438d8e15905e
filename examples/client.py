"""
Asks with ChatClient, as a Python service beside ours would: it notices a lost worker and cancels.

    python examples/client.py "What is your name?"
"""

import asyncio
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that contains `services`

from services.client.chat_client import ChatClient
from services.contract.messages import ChatRequest, Done, Failed, Token
from services.runtime.bus import Bus
from services.runtime.settings import ServiceSettings, load

CONNECT_TIMEOUT = 3.0  # seconds; Bus.connect itself waits without limit


async def main(prompt: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        connecting = Bus.connect(load(ServiceSettings).nats_url, "example")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bus = await stack.enter_async_context(connecting)
        except TimeoutError:
            sys.exit(
                "NATS can't be reached: start it with `just up`, or set NATS_URL or NATS_PORT."
            )
        await ask(bus, ChatRequest(prompt=prompt, session_id="example", max_tokens=80))


async def ask(bus: Bus, request: ChatRequest) -> None:
    async with contextlib.aclosing(ChatClient(bus).stream(request)) as events:
        async for event in events:
            match event:
                case Token():
                    print(event.text, end="", flush=True)
                case Done():
                    print(f"\n[{event.finish_reason}, {event.usage}]")
                case Failed():
                    sys.exit(f"\n{event.code}: {event.message}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
