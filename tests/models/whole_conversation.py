"""The real model with its own template: a long session, logprobs, and killed workers."""

import json
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.servers import whole_stack
from tests.e2e.stack import Process, Stack
from tests.servers import wait_for

TEMPLATES = Path(".data/llama.cpp/models/templates")
TURNS = 24
KILL_AFTER = 12  # events with text
WEATHER = {
    "type": "function",
    "function": {
        "name": "report",
        "description": "Report the weather",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["text", "days"],
        },
    },
}

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NUMBER = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}


@dataclass
class Received:
    """An answer of `/chat` by channel; each event's id must be its end offset."""

    channels: dict[str, str] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    length: int = 0
    events: int = 0
    at_kill: str = ""
    """The text that was received when the worker was killed."""

    def take(self, event_id: str, event: dict[str, Any]) -> None:
        if "tool_call" in event:
            call = event["tool_call"]
            text, channel = call.get("name", "") + call["arguments"], f"call {call['index']}"
        elif found := {"token", "reasoning"} & event.keys():
            (channel,) = found
            text = event[channel]
        else:
            self.end = event
            return
        self.events += 1
        self.length += len(text)
        assert int(event_id) == self.length, "an offset is wrong"
        self.channels[channel] = self.channels.get(channel, "") + text


def run(model: Path) -> list[str]:
    """Return a line per check; a failure begins with `FAILED`."""
    return [
        _line(
            f"a session of {TURNS} turns, some with a tool or a schema, in a small window",
            _long_session,
            model,
        ),
        _line("logprobs", _logprobs, model),
        _line("a worker killed in mid-answer", _killed, model, {}, {}),
        _line("a worker killed in mid-thought", _killed, model, _thinking(), {"max_tokens": 8}),
        _line("a worker killed in mid-call", _killed, model, {}, _calling()),
    ]


def _line(name: str, check: Any, *arguments: Any) -> str:
    print(f"{name} …", flush=True)
    try:
        outcome = check(*arguments)
    except (AssertionError, httpx.HTTPError, LookupError, ValueError) as error:
        outcome = f"FAILED: {error}"
    print(f"{name}: {outcome}", flush=True)
    return f"- {name}: {outcome}"


def _thinking() -> dict[str, str]:
    return {"MODEL_CHAT_TEMPLATE": str((TEMPLATES / "Qwen3.5-4B.jinja").resolve())}


def _calling() -> dict[str, Any]:
    return {"tools": [WEATHER], "tool_choice": "required"}


def _long_session(model: Path) -> str:
    """Exchanges drop out of the window; what is left is remembered and cached."""
    with whole_stack(model, MODEL_CONTEXT="448", MODEL_PARALLEL="2") as up:
        cached = dropped = called = 0
        for turn in range(1, TURNS + 1):
            prompt = f"Remember the number {100 + turn}. Which number came before it?"
            more: dict[str, Any] = {"tools": [WEATHER]} if turn % 6 == 0 else {}
            more |= {"response_format": NUMBER} if turn % 6 == 3 else {}
            prompt = "Report by the tool: sunny for 3 days." if "tools" in more else prompt
            text, end = up.chat(prompt, "long", max_tokens=48, **more)
            assert end.get("done"), end
            assert "response_format" not in more or type(json.loads(text)["n"]) is int, text
            called += end["finish_reason"] == "tool_calls"
            dropped = end["exchanges_dropped"]
            cached += end["usage"]["cached_tokens"] > 0
        assert dropped > 0, "nothing was dropped"
        stored = len(up.messages("long"))
        assert stored == TURNS, f"{stored} exchanges are stored"
    return (
        f"ok, {dropped} exchanges dropped at the end, {cached} of {TURNS} prompts had a prefix,"
        f" {called} of {TURNS // 6} prompts with a tool were answered by a call"
    )


def _logprobs(model: Path) -> str:
    with whole_stack(model, MODEL_CONTEXT="1024", MODEL_PARALLEL="2") as up:
        body = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": 3, "max_tokens": 12, "model": model.stem}
        got = up.http.post("/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    tokens = got["logprobs"]["content"]
    assert "".join(each["token"] for each in tokens) == got["message"]["content"]
    assert all(each["top_logprobs"][0]["token"] == each["token"] for each in tokens)
    return "ok"


def _killed(model: Path, settings: dict[str, str], more: dict[str, Any]) -> str:
    """
    The answer of a killed worker goes on where it was, and ends. It mostly equals the undisturbed
    one; but the logits of quantized models depend a little on how many tokens are computed at once.
    """
    body: dict[str, Any] = {"prompt": "Describe the weather in Rome.", "temperature": 0}
    body |= {"max_tokens": 60, "reasoning_budget_tokens": 40, "enable_thinking": True} | more
    with _two_workers(model, **settings) as (up, workers):
        whole = _ask(up, body | {"session_id": "whole"}, {})
        killed = _ask(up, body | {"session_id": "killed"}, workers)
        assert killed.end.get("done"), killed.end
        begun, text = killed.at_kill, "".join(whole.channels.values())
        assert begun and text.startswith(begun), (begun, text)
        assert sum(worker.is_running for worker in workers.values()) == 1, "nothing was killed"
    lengths = ", ".join(f"{name}: {len(text)}" for name, text in killed.channels.items())
    is_same = killed.channels == whole.channels
    return f"ok ({lengths}){'' if is_same else ', other words after the kill'}"


@contextmanager
def _two_workers(model: Path, **settings: str) -> Iterator[tuple[Stack, dict[str, Process]]]:
    """Yield a stack with two workers, and these by their ids."""
    window = {"MODEL_CONTEXT": "1024", "MODEL_PARALLEL": "2", "MODEL_THREADS": "1"}
    with whole_stack(model, **(window | settings)) as up, tempfile.TemporaryDirectory() as folder:
        (first,) = _worker_ids(up)
        added = Process("services.inference", 0, up.inference.environ, Path(folder))
        added.start()
        try:
            wait_for(lambda: len(_worker_ids(up)) == 2, "the second worker", 60)
            (second,) = _worker_ids(up) - {first}
            yield up, {first: up.inference, second: added}
        finally:
            added.stop()


def _worker_ids(up: Stack) -> set[str]:
    return {each["worker_id"] for each in up.status()["workers"] if each["state"] == "ready"}


def _ask(up: Stack, body: dict[str, Any], workers: dict[str, Process]) -> Received:
    """Return an answer. The worker that generates it is killed in its middle, if any is given."""
    received, event_id = Received(), ""
    with up.http.stream("POST", "/chat", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                received.take(event_id, json.loads(line[6:]))
            if received.events >= KILL_AFTER and workers and not received.at_kill:
                received.at_kill = "".join(received.channels.values())
                _busy_worker(up, workers).signal(signal.SIGKILL)
    return received


def _busy_worker(up: Stack, workers: dict[str, Process]) -> Process:
    busy: list[str] = []

    def is_known() -> bool:
        busy[:] = [each["worker_id"] for each in up.status()["workers"] if each["running"]]
        return len(busy) == 1

    wait_for(is_known, "the busy worker", 30)
    return workers[busy[0]]
