"""
Find the model as an agent and prompt it, with the client of the Synadia Agent Protocol alone.

    pip install synadia-ai-agents
    python examples/agent.py "What is your name?"
"""

import asyncio
import os
import sys

import nats
from synadia_ai.agents import Agents, ProtocolError, ResponseChunk

NATS_PORT = os.environ.get("NATS_PORT") or "4222"  # the default of `just up`
NATS_URL = os.environ.get("NATS_URL") or f"nats://127.0.0.1:{NATS_PORT}"
NATS_CREDS = os.environ.get("NATS_CREDS")  # the seed of an nkey: `just secrets show client`
NATS_INBOX_PREFIX = os.environ.get("NATS_INBOX_PREFIX") or "_INBOX"


async def main(prompt: str) -> None:
    nc = await nats.connect(NATS_URL, nkeys_seed=NATS_CREDS, inbox_prefix=NATS_INBOX_PREFIX)
    agents = Agents(nc=nc)
    found = [agent for agent in await agents.discover() if agent.agent == "finetunellm"]
    if not found:
        sys.exit("No edge is running: start `just up`.")
    try:
        async for chunk in found[0].prompt(prompt):
            if isinstance(chunk, ResponseChunk):
                print(chunk.text, end="", flush=True)
    except ProtocolError as error:
        sys.exit(str(error))
    print()
    await agents.close()
    await nc.close()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
