"""
Measure what floods of one tenant cost another one: bob's time to first token alone, and beside each
flood of ann, through a real edge with a key for each.

    python -m bench.fairness model/demo.gguf
    python -m bench.fairness model/demo.gguf --only n=16 left

Writes bench/results/fairness.md, unless only some floods run.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench import floods, servers
from bench.load import words
from bench.report import RESULTS
from tests.e2e.stack import Stack

Json = dict[str, Any]

KEYS = {"ann": "ann-key", "bob": "bob-key"}
SLOTS, QUEUE = 8, 64
WARM_UP_SECONDS = 2.0  # of a flood, before bob asks
TOKENS = 64  # of each of ann's answers
NOTE = f"""One worker with {SLOTS} slots and a queue of {QUEUE}, one edge. Bob asks one short
question after the other, each in a session of its own. *Alone* is measured right before each flood.
*An answer of ann* is the median of as many requests of the flood as there are slots, at once, to
their end, after the flood. The bar for bob's median is twice his median alone, plus one answer of
ann."""


class Flood(NamedTuple):
    """Requests of ann that `clients` clients send in loops; they leave after `leaves` seconds."""

    name: str
    clients: int
    path: str
    body: Callable[[], Json]
    leaves: float | None = None


def chat(**more: Any) -> Json:
    message = {"role": "user", "content": f"{words(5)}: tell me about it."}
    return {"messages": [message], "max_tokens": TOKENS} | more


def messages(count: int) -> list[Json]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "hi"} for i in range(count)]


def schema(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "flood", "schema": schema}}


def optional(count: int) -> Json:
    names = (f"{words(1)}_{number}" for number in range(count))
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}}


def repetitions() -> Json:
    inner = {"type": "array", "items": {"type": "integer", "maximum": random.randint(1, 10**6)}}
    return {"type": "array", "minItems": 900, "items": inner}


def tool() -> Json:
    name = f"f{random.randrange(10**9)}"
    return {"type": "function", "function": {"name": name, "parameters": optional(20)}}


def biased() -> Json:
    bias = {str(token): random.uniform(-5, 5) for token in range(300)}
    stops = [words(4) for _ in range(4)]
    return chat(logit_bias=bias, stop=stops, logprobs=True, top_logprobs=20)


V1, COUNT = "/v1/chat/completions", "/v1/chat/completions/input_tokens"
FLOODS = (
    Flood("n=16", 6, V1, lambda: chat(n=16)),
    Flood("chats left at once", 8, "/chat", lambda: {"prompt": words(5)}, leaves=0.15),
    Flood("long prompts", 8, V1,
          lambda: chat(messages=[{"role": "user", "content": words(400)}])),
    Flood("9,999 messages, counted", 4, COUNT, lambda: {"messages": messages(9_999)}),
    Flood("9,999 messages", 4, V1, lambda: chat(messages=messages(9_999))),
    Flood("tokenize 500 kB, pieces", 4, "/v1/tokenize",
          lambda: {"content": words(190_000)[:500_000], "with_pieces": True}),
    Flood("480 optional properties", 8, V1, lambda: chat(response_format=schema(optional(480)))),
    Flood("repetitions in a schema", 8, V1, lambda: chat(response_format=schema(repetitions()))),
    Flood("128 tools", 4, V1,
          lambda: chat(tools=[tool() for _ in range(128)], tool_choice="required")),
    Flood("bias, stops, logprobs", 16, V1, biased),
)  # fmt: skip


class Row(NamedTuple):
    flood: Flood
    alone: float  # seconds, as all others
    beside: list[float]
    failed: int
    answer: float
    statuses: Counter[str]

    @property
    def bar(self) -> float:
        return 2 * self.alone + self.answer

    @property
    def is_met(self) -> bool:
        return bool(self.beside) and statistics.median(self.beside) <= self.bar

    def __str__(self) -> str:
        median = 1000 * statistics.median(self.beside) if self.beside else float("nan")
        worst = 1000 * max(self.beside, default=float("nan"))
        statuses = ", ".join(f"{count} × {status}" for status, count in self.statuses.items())
        cells = (
            f"{self.flood.name} × {self.flood.clients}",
            statuses,
            f"{1000 * self.alone:.0f}",
            f"{median:.0f}",
            f"{worst:.0f}",
            f"{self.failed} of {len(self.beside) + self.failed}",
            f"{1000 * self.answer:.0f}",
            f"{1000 * self.bar:.0f}",
            "yes" if self.is_met else "**no**",
        )
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| flood × clients | answers to ann | alone | p50 | worst | bob failed | an answer of ann"
    " | bar | met |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    options = _options()
    keys = ",".join(f"{tenant}:{key}" for tenant, key in KEYS.items())
    settings = {
        "EDGE_API_KEYS": keys,
        "MODEL_PARALLEL": str(SLOTS),
        "MODEL_QUEUE": str(QUEUE),
        "MODEL_THREADS": str(options.threads),
    }
    floods = [f for f in FLOODS if any(part in f.name for part in options.only or [""])]
    rows = []
    with servers.whole_stack(options.model, **settings) as up:
        url = str(up.http.base_url)
        for flood in floods:
            rows.append(_measure(up, url, flood, options.seconds))
            print(rows[-1], flush=True)
    report = "\n".join(["# Fairness between tenants", "", NOTE, "", "Milliseconds, of"
                        f" `{options.model.stem}`:", "", HEAD, *map(str, rows), ""])  # fmt: skip
    if not options.only:
        (RESULTS / "fairness.md").write_text(report)
    print(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what floods cost another tenant.")
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each flood")
    parser.add_argument("--threads", type=int, default=1, help="MODEL_THREADS")
    parser.add_argument("--only", nargs="+", help="run floods whose name contains one of these")
    return parser.parse_args()


def _wait_until_idle(up: Stack) -> None:
    while (report := up.next_report()).running + report.waiting:
        time.sleep(0.2)


def _measure(up: Stack, url: str, flood: Flood, seconds: float) -> Row:
    """Flood from another process, whose work would delay what bob measures."""
    alone, _ = asyncio.run(_bob(url, seconds / 3))
    context = multiprocessing.get_context("spawn")
    statuses = context.Queue()
    number = FLOODS.index(flood)
    process = context.Process(
        target=_flood, args=(url, number, seconds + WARM_UP_SECONDS, statuses)
    )
    process.start()
    try:
        found = [statuses.get()]  # it has started
        time.sleep(WARM_UP_SECONDS)
        beside, failed = asyncio.run(_bob(url, seconds))
        found.append(statuses.get())
    finally:
        process.join()
    _wait_until_idle(up)
    answer = asyncio.run(_answer_of_ann(url, flood))  # its session is as long as in the flood
    _wait_until_idle(up)
    return Row(flood, statistics.median(alone), beside, failed, answer, found[-1])


def _client(url: str, tenant: str) -> httpx.AsyncClient:
    headers = {"X-API-Key": KEYS[tenant]}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits)


async def _bob(url: str, seconds: float) -> tuple[list[float], int]:
    """Return the times to first token of sequential questions, and how many got no answer."""
    times, failed = list[float](), 0
    ends_at = time.monotonic() + seconds
    async with _client(url, "bob") as client:
        while time.monotonic() < ends_at or not times and failed < 3:
            began = time.monotonic()
            first = None
            async for event in _events(client):
                if first is None and "token" in event:
                    first = time.monotonic() - began
            if first is None:
                failed += 1
                await asyncio.sleep(0.5)
            else:
                times.append(first)
    return times, failed


async def _events(client: httpx.AsyncClient) -> AsyncIterator[Json]:
    prompt = f"{words(5)}: what is it?"
    body = {"prompt": prompt, "session_id": words(12), "max_tokens": 8}
    async with client.stream("POST", "/chat", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


async def _answer_of_ann(url: str, flood: Flood) -> float:
    """Return the median seconds of requests of the flood, one for each slot, with one answer."""

    async def one(client: httpx.AsyncClient) -> float:
        body = flood.body()
        began = time.monotonic()
        await client.post(flood.path, json=body | ({"n": 1} if "n" in body else {}))
        return time.monotonic() - began

    async with _client(url, "ann") as client:
        return statistics.median(await asyncio.gather(*(one(client) for _ in range(SLOTS))))


def _flood(url: str, number: int, seconds: float, statuses: "multiprocessing.Queue[Any]") -> None:
    """Runs in a process of its own. Puts None when it starts, and then the counts of statuses."""
    statuses.put(None)
    statuses.put(asyncio.run(_send(url, FLOODS[number], seconds)))


async def _send(url: str, flood: Flood, seconds: float) -> Counter[str]:
    async with _client(url, "ann") as client:

        async def send() -> str:
            try:
                async with asyncio.timeout(flood.leaves):
                    return str((await client.post(flood.path, json=flood.body())).status_code)
            except TimeoutError:
                return "left"

        return await floods.repeat(send, flood.clients, seconds)


if __name__ == "__main__":
    main()
