"""
Send a request with ChatClient, as another Python service would. ChatClient fails over when a worker
is lost, and cancels the request when its caller leaves.

    python examples/client.py "What is your name?"
"""

import asyncio
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that contains `services`

from services.client.chat_client import ChatClient
from services.contract.messages import ChatRequest, Done, Failed, Token, ToolCallDelta
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting, ServiceSettings, load

CONNECT_SECONDS = 3.0  # Bus.connect itself waits forever


async def main(prompt: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        settings = load(ServiceSettings)
        connecting = stack.enter_async_context(
            Bus.connect(settings.nats_url, "example", NatsAccess.of(settings))
        )
        try:
            bus = await asyncio.wait_for(connecting, CONNECT_SECONDS)
        except TimeoutError:
            sys.exit(
                "NATS can't be reached: start it with `just up`, or set NATS_URL or NATS_PORT."
            )
        await print_answer(bus, ChatRequest(prompt=prompt, session_id="example", max_tokens=80))


async def print_answer(bus: Bus, request: ChatRequest) -> None:
    async with contextlib.aclosing(ChatClient(bus).stream(request)) as events:
        async for event in events:
            match event:
                case Token(channel="content"):
                    print(event.text, end="", flush=True)
                case ToolCallDelta():
                    print(event.name, event.arguments, end="", flush=True)
                case Done():
                    print(f"\n[{event.finish_reason}, {event.usage}]")
                case Failed():
                    sys.exit(f"\n{event.code}: {event.message}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
        except InvalidSetting as error:  # such as credentials that NATS rejects
            sys.exit(str(error))
