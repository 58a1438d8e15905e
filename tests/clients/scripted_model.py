"""A worker whose model says what the programs of clients expect."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.contract import prompts, subjects
from services.contract.conversation import ChatMessage
from services.contract.messages import ChatRequest, Failed, StreamEvent
from services.runtime.bus import Bus
from services.runtime.deliveries import Endpoint
from tests.fakes import ACCEPTED, MODEL, ScriptedWorker, answer_script, report

PERSON = {"name": "Ada", "age": 36}
CITY = {"city": "Rome"}
REPORT_SECONDS = 1.0


class ScriptedModel(ScriptedWorker):
    """Calls the only tool once, answers in the format that was asked for, or says hello."""

    async def _run_script(self, request_id: str | None, reply: str) -> None:
        request = next(each for _, each in self.requests if each.request_id == request_id)
        for step in say(request):
            await self._bus.publish(reply, step)


def say(request: ChatRequest) -> tuple[StreamEvent, ...]:
    messages = request.messages or (ChatMessage("user", request.prompt or ""),)
    last = messages[-1]
    if request.model not in (None, MODEL.name):
        return (Failed("model_not_found", f"There is no model {request.model!r}."),)
    if "TOO LONG" in last.text:
        error = prompts.context_exceeded("messages", "9000", 2048)
        return ACCEPTED, Failed(error.code, error.message)
    forced = request.tool_choice not in ("auto", "none", None)
    if request.tools and last.role != "tool" and (forced or "weather" in last.text):
        return _call(request)
    if request.response_format or "JSON" in _all_text(messages):
        return _script(("content", json.dumps(PERSON)))
    if last.role == "tool":
        return _script(("content", "It is "), ("content", f"{last.text}."))
    return _script(("content", "Hello, "), ("content", "Ada."))


def _call(request: ChatRequest) -> tuple[StreamEvent, ...]:
    assert request.tools is not None
    function = request.tools[0].function
    properties = (function.parameters or {}).get("properties", {})
    arguments = CITY if "city" in properties else PERSON
    parts = (("call", function.name), ("arguments", json.dumps(arguments)))
    return _script(*parts, finish_reason="tool_calls")


def _all_text(messages: tuple[ChatMessage, ...]) -> str:
    return "\n".join(message.text for message in messages)


def _script(*parts: tuple[str, str], **more: str) -> tuple[StreamEvent, ...]:
    return tuple(answer_script(*parts, **more))  # type: ignore[arg-type]


@asynccontextmanager
async def scripted_model(nats_url: str) -> AsyncIterator[None]:
    """Serve the model, and report it once a second."""
    async with Bus.connect(nats_url, "scripted model") as bus:
        worker = ScriptedModel(bus, ())
        subject = subjects.worker_request("w1", subjects.ANY)
        endpoints = [
            Endpoint("direct", subject, worker.on_direct_request),
            Endpoint("chat", subjects.request(subjects.OPEN_TENANT), worker.on_request),
        ]
        await bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), worker.on_cancel)
        await bus.serve("scripted", "scripted", endpoints)
        reporting = asyncio.create_task(_report(bus))
        yield
        reporting.cancel()


async def _report(bus: Bus) -> None:
    while True:
        await bus.publish(subjects.report("w1"), report("w1"))
        await asyncio.sleep(REPORT_SECONDS)
