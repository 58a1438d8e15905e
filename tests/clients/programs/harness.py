"""Runs the uses of one client one after another, and prints how each one went."""

import asyncio
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("EDGE_URL") or "http://localhost:8002"
KEY = "any"
MODEL = "demo"
PROMPT = "How is the weather in Rome?"
"""What the scripted model of tests/clients answers by a call of the only tool."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    assert city == "Rome"
    return "sunny"


def run(*uses: Callable[[], Any]) -> None:
    """Call each function, or await it, and exit with 1 if one of them raised something."""
    failed = False
    runner = asyncio.Runner()  # of all uses: clients keep connections in their loop
    for use in uses:
        name = use.__name__.replace("_", " ")
        try:
            result = use()
            if asyncio.iscoroutine(result):
                runner.run(result)
        except Exception:
            failed = True
            print(f"{name}: failed", flush=True)
            traceback.print_exc()
        else:
            print(f"{name}: ok", flush=True)
    sys.exit(failed)
