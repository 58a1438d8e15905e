"""
Asks over plain NATS: nats-py is all that it needs, nothing of this project.

    python examples/native.py "What is your name?"
"""

import asyncio
import json
import os
import sys

import nats

NATS_PORT = os.environ.get("NATS_PORT") or "4222"  # the default of `just up`
NATS_URL = os.environ.get("NATS_URL") or f"nats://127.0.0.1:{NATS_PORT}"
CONNECT_TIMEOUT = 3.0  # seconds
SILENCE_LIMIT = 5.0  # seconds; a worker sends something at least once a second


async def ignore(error: Exception) -> None:
    """nats-py would print each failed attempt with its traceback."""


async def main(prompt: str) -> None:
    try:
        nc = await asyncio.wait_for(nats.connect(NATS_URL, error_cb=ignore), CONNECT_TIMEOUT)
    except TimeoutError:
        sys.exit("NATS can't be reached: start it with `just up`, or set NATS_URL or NATS_PORT.")
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox)  # before asking, so that nothing is missed
    await nc.publish("chat.request", json.dumps({"prompt": prompt}).encode(), reply=inbox)
    while True:
        try:
            message = await answers.next_msg(SILENCE_LIMIT)
        except TimeoutError:
            sys.exit("\nthe worker went silent: it is lost")
        if not message.data:  # NATS's own word: nobody listens to chat.request
            sys.exit("no worker is there to answer")
        event = json.loads(message.data)
        match event["type"]:
            case "token":
                print(event["text"], end="", flush=True)
            case "done":
                print(f"\n[{event['finish_reason']}, {event['usage']}]")
                break
            case "failed":
                sys.exit(f"{event['code']}: {event['message']}")
    await nc.close()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
