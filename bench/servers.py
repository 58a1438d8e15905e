"""The servers under load: the whole FineTuneLLM stack, llama-server alone, and running peers."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench.load import FineTuneTarget, OpenAITarget, Target
from bench.pairs import Plan
from services.inference.engine.ggml import has_wrong_amx
from services.runtime import huge_pages
from tests.e2e.stack import NO_MONGO, Process, Stack, running_stack
from tests.servers import free_port, nats_server, wait_for

THREADS = 2
SLOTS = 16
LLAMA_SERVER = f"llama-server -np {SLOTS} -t {THREADS} -c {SLOTS * 2048}"
TUNED = "--backend-sampling --kv-unified --flash-attn on"
SYSTEM = "You are a helpful, friendly assistant. Answer briefly and clearly."
SAMPLING = {"temperature": 0.5, "top_p": 0.9}
LLAMA_OPTIONS = SAMPLING | {
    "top_k": 40,
    "repeat_penalty": 1.1,
    "samplers": ["penalties", "top_k", "top_p", "temperature"],
    "ignore_eos": True,
    "cache_prompt": True,
}
TOP_K_FIRST = ["top_k", "penalties", "top_p", "temperature"]


@contextmanager
def whole_stack(model: Path, **settings: str) -> Iterator[Stack]:
    defaults = {
        "MODEL_PATH": str(model),
        "MODEL_THREADS": str(THREADS),
        "MODEL_PARALLEL": str(SLOTS),
        "CHAT_SYSTEM_PROMPT": SYSTEM,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(
            Path(folder), NO_MONGO, False, nats_server(Path(folder)), **(defaults | settings)
        ) as up,
    ):
        yield up


@contextmanager
def more_workers(up: Stack, count: int) -> Iterator[None]:
    """Add workers to a stack, and wait until they are ready: they load one after the other."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        for number in range(count):
            logs = Path(folder) / str(number)
            logs.mkdir()
            worker = Process("services.inference", 0, up.inference.environ, logs)
            cleanup.callback(worker.stop, signal.SIGKILL)
            worker.start()
        wait_for(lambda: _ready_workers(up) > count, "more workers", 120)
        yield


def _ready_workers(up: Stack) -> int:
    return sum(worker["state"] == "ready" for worker in up.status()["workers"])


def stack_target(up: Stack) -> FineTuneTarget:
    return FineTuneTarget(str(up.http.base_url).rstrip("/"))


@contextmanager
def llama_server(model: Path, tuning: str = "") -> Iterator[OpenAITarget]:
    """
    Run llama-server. `tuning` adds options, huge pages, and the order of samplers that is fastest.
    """
    port = free_port()
    without_amx = " --no-repack" if has_wrong_amx() else ""  # else it ends with SIGILL, too
    command = (
        f"bench/.llama/{LLAMA_SERVER}{without_amx} {tuning} -m {model} --port {port} --log-disable"
    )
    # our engine, whose package is imported above, has set GOMP_SPINCOUNT for itself
    ours = ("GOMP_SPINCOUNT", huge_pages.TUNABLES)
    environ = {key: value for key, value in os.environ.items() if key not in ours}
    if tuning:
        environ[huge_pages.TUNABLES] = huge_pages.ON
    process = subprocess.Popen(
        command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _is_up(f"{url}/health"), "llama-server", 60)
        if tuning:
            yield OpenAITarget("tuned", url, SYSTEM, LLAMA_OPTIONS | {"samplers": TOP_K_FIRST})
        else:
            yield OpenAITarget("llama-server", url, SYSTEM, LLAMA_OPTIONS)
    finally:
        process.terminate()
        process.wait()


def peer(url: str) -> OpenAITarget:
    """Return a running OpenAI-compatible server with the first model that it lists."""
    model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
    return OpenAITarget(urlsplit(url).netloc, url, SYSTEM, SAMPLING | {"model": model})


@contextmanager
def all_targets(plan: Plan) -> Iterator[list[Target]]:
    """Run our stack, and llama-server at its defaults and tuned; yield them and the peers."""
    with (
        whole_stack(plan.model) as up,
        more_workers(up, plan.workers - 1),
        llama_server(plan.model) as theirs,
        llama_server(plan.model, TUNED) as tuned,
    ):
        yield [stack_target(up), theirs, tuned, *map(peer, plan.peers)]


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False
