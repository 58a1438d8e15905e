"""
Send a request over plain NATS and print the answer. Needs nats-py only, nothing of this project.

    python examples/native.py "What is your name?"
"""

import asyncio
import json
import os
import sys

import nats

NATS_PORT = os.environ.get("NATS_PORT") or "4222"  # the default of `just up`
NATS_URL = os.environ.get("NATS_URL") or f"nats://127.0.0.1:{NATS_PORT}"
NATS_CREDS = os.environ.get("NATS_CREDS")  # the seed of an nkey: `just secrets show client`
NATS_INBOX_PREFIX = os.environ.get("NATS_INBOX_PREFIX") or "_INBOX"
CONNECT_SECONDS = 3.0
SILENCE_SECONDS = 5.0  # a worker sends at least one event a second


async def ignore(error: Exception) -> None:
    """Keep nats-py from printing a traceback for each failed attempt to connect."""


async def main(prompt: str) -> None:
    try:
        connecting = nats.connect(
            NATS_URL, nkeys_seed=NATS_CREDS, inbox_prefix=NATS_INBOX_PREFIX, error_cb=ignore
        )
        nc = await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except TimeoutError:
        sys.exit(
            "NATS can't be reached, or rejects NATS_CREDS: start it with `just up`, or set NATS_URL"
            " or NATS_PORT."
        )
    inbox = nc.new_inbox()
    events = await nc.subscribe(inbox)  # before the request, so that no event is missed
    await nc.publish("chat.request", json.dumps({"prompt": prompt}).encode(), reply=inbox)
    while True:
        try:
            message = await events.next_msg(SILENCE_SECONDS)
        except TimeoutError:
            sys.exit("\nThe worker has stopped responding.")
        if not message.data:  # NATS replies "no responders": nobody subscribes to chat.request
            sys.exit("No worker is running.")
        event = json.loads(message.data)
        match event["type"]:
            case "token" if event.get("channel", "content") == "content":  # or "reasoning"
                print(event["text"], end="", flush=True)
            case "done":
                print(f"\n[{event['finish_reason']}, {event['usage']}]")
                break
            case "failed":
                sys.exit(f"{event['code']}: {event['message']}")
    await nc.close()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "Hello!"))
