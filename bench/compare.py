"""
FineTuneLLM's whole stack (HTTP, edge, NATS, inference and back) against llama-server alone: the
same
model, sampler chain and two threads; interleaved pairs of runs, the median of their ratios.

    just bench 135M Q8_0
"""

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.burst import Burst, burst
from bench.load import FineTune, OpenAI, Target
from bench.models import SHAPES, TYPES, make
from tests.e2e.stack import NO_MONGO, stack
from tests.servers import free_port, wait_for

RESULTS = Path("bench/results")
SERVER = Path("bench/.llama/llama-server")
CHATS = (1, 2, 4, 8, 16)
PAIRS = 5
THREADS = "2"
SYSTEM = "You are a helpful, friendly assistant. Answer briefly and clearly."
SAMPLING = {
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.9,
    "repeat_penalty": 1.1,
    "samplers": ["penalties", "top_k", "top_p", "temperature"],
    "ignore_eos": True,
    "cache_prompt": True,
}


@contextmanager
def ours(model: Path) -> Iterator[Target]:
    settings = {
        "MODEL_PATH": str(model),
        "MODEL_THREADS": THREADS,
        "MODEL_PARALLEL": "16",
        "CHAT_SYSTEM_PROMPT": SYSTEM,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        stack(Path(folder), NO_MONGO, False, **settings) as up,
    ):
        yield FineTune(str(up.http.base_url).rstrip("/"))


@contextmanager
def llama_server(model: Path) -> Iterator[Target]:
    port = free_port()
    command = f"{SERVER} -m {model} -np 16 -t {THREADS} -c 32768 --port {port} --log-disable"
    process = subprocess.Popen(
        command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _is_up(f"{url}/health"), "llama-server", 60)
        yield OpenAI("llama-server", url, SYSTEM, SAMPLING)
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


async def compare(a: Target, b: Target) -> list[str]:
    """A row of the table for each number of chats."""
    for target in (a, b):
        await burst(target, 2)  # warm
    rows = []
    for chats in CHATS:
        pairs = [(await burst(a, chats), await burst(b, chats)) for _ in range(PAIRS)]
        rows.append(_row(chats, pairs))
        print(rows[-1], flush=True)
    return rows


def _row(chats: int, pairs: list[tuple[Burst, Burst]]) -> str:
    speed = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
    first = [a.first_token / b.first_token for a, b in pairs]
    cells = [
        f"{chats}",
        f"{statistics.median(a.tokens_per_second for a, _ in pairs):.0f}",
        f"{statistics.median(b.tokens_per_second for _, b in pairs):.0f}",
        f"**{statistics.median(speed):.2f}** ({min(speed):.2f} to {max(speed):.2f})",
        f"{statistics.median(a.first_token for a, _ in pairs):.2f}",
        f"{statistics.median(b.first_token for _, b in pairs):.2f}",
        f"**{statistics.median(first):.2f}** ({min(first):.2f} to {max(first):.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
         if x.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SHAPES, nargs="?", default="135M")
    parser.add_argument("kind", choices=TYPES, nargs="?", default="Q8_0")
    options = parser.parse_args()
    model = make(options.size, options.kind)
    with ours(model) as a, llama_server(model) as b:
        rows = asyncio.run(compare(a, b))
    RESULTS.mkdir(exist_ok=True)
    text = f"""# Bursts, {options.size} {options.kind}

{machine()}. c chats at once, 50-word prompts, 64 new tokens; {PAIRS} interleaved pairs of runs;
medians, and the ratios' spread. Ours is the whole stack over HTTP; llama-server alone:
`-np 16 -t {THREADS} -c 32768`.

| c | ours tok/s | llama-server tok/s | ratio | ours TTFT s | llama-server TTFT s | ratio |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    (RESULTS / f"burst-{options.size}-{options.kind}.md").write_text(text)


if __name__ == "__main__":
    main()
