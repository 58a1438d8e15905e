"""
Asks with ChatClient, as a Python service beside ours would: it notices a lost worker and cancels.

    python -m examples.client "What is your name?"
"""

import asyncio
import contextlib
import os
import sys

from services.client.chat import ChatClient
from services.contract.messages import ChatRequest, Done, Failed, Token
from services.runtime.bus import Bus

NATS_URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")


async def main(prompt: str) -> None:
    async with Bus.connect(NATS_URL, "example") as bus:
        request = ChatRequest(prompt=prompt, session_id="example", max_tokens=80)
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
    asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
