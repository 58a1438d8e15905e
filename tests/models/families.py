"""
`just models`: a real model behind the chat template of each family, with real processes and
OpenAI's client. The model knows its own template only (ChatML with Hermes calls), so in others it
may answer oddly, and may not call a tool by itself; forced calls, budgets and markup must hold in
all of them.

    python -m tests.models.families --families Qwen3.5-4B,GLM-4.6 --save
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai

from bench.servers import whole_stack
from tests.models import whole_conversation
from tests.models.real_model import NAME, real_model, with_template

TEMPLATES = Path(".data/llama.cpp/models/templates")
RESULTS = Path("bench/results/models.md")
OWN = "Qwen-Qwen2.5-7B-Instruct"
FAMILIES = (
    OWN,
    "Qwen-Qwen3-0.6B",
    "Qwen3-Coder",
    "Qwen3.5-4B",
    "GLM-4.6",
    "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai-DeepSeek-V3.2",
    "moonshotai-Kimi-K2",
    "Kimi-K3",
    "MiniMax-M2",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "google-gemma-4-31B-it",
    "openai-gpt-oss-120b",
    "LFM2.5-8B-A1B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "ibm-granite-granite-4.0",
    "ibm-granite-granite-3.3-2B-Instruct",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "ByteDance-Seed-OSS",
    "Apertus-8B-Instruct",
    "meetkai-functionary-medium-v3.1",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "HuggingFaceTB-SmolLM3-3B",
    "microsoft-Phi-3.5-mini-instruct",
)
MARKUP = ("<tool_call", "</tool_call", "<function", "<parameter", "<|", "|>", "[TOOL_CALLS]")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
# `tool_choice`, streamed, and thinking, of forced calls
FORCED: tuple[tuple[Any, bool, bool | None], ...] = (
    ("required", False, None),
    (NAMED, True, False),
    (NAMED, False, True),
)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NUMBER = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}
BUDGET = 12  # tokens
MAX_TAGS = 32  # tokens of the tags around a thought, if the vocabulary has none for them


class Failure(Exception):
    """The answer is not what it must be."""


class Model(NamedTuple):
    """The running stack, by OpenAI's client."""

    client: openai.OpenAI

    def ask(self, prompt: str | list[Any], stream: bool = False, **options: Any) -> Any:
        """Return the only choice. A streamed one is put together by OpenAI's own helper."""
        return self.complete(prompt, stream, **options).choices[0]

    def complete(self, prompt: str | list[Any], stream: bool = False, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        extra = {"reasoning_budget_tokens": BUDGET} | options.pop("extra_body", {})
        options |= {"model": NAME, "temperature": 0, "max_tokens": 200, "extra_body": extra}
        completions: Any = self.client.chat.completions
        if not stream:
            return completions.create(messages=messages, **options)
        try:
            with completions.stream(messages=messages, **options) as events:
                return events.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            return cut.completion


def plain(model: Model) -> str:
    """The prefix of both answers is cached: logits depend on what is computed at once."""
    question = "What is the capital of France? Answer in one word."
    _, whole, streamed = (model.ask(question, stream) for stream in (False, False, True))
    if whole.message.content != streamed.message.content:
        raise Failure(f"streamed {streamed.message.content!r}, whole {whole.message.content!r}")
    return _oddity(whole) or ("ok" if "Paris" in whole.message.content else "ok, odd")


def forced_call(model: Model) -> str:
    """By `required` and by name, thinking or not."""
    for choice, stream, thinks in FORCED:
        extra = {} if thinks is None else {"enable_thinking": thinks}
        options = {"tools": [WEATHER], "tool_choice": choice, "extra_body": extra}
        _call_of(model.ask("Weather in Rome?", stream, **options))
    return "ok"


def tool_loop(model: Model) -> str:
    """Two steps: a call, then an answer to its result."""
    messages: list[Any] = [{"role": "user", "content": "Weather in Rome today?"}]
    first = model.ask(messages, tools=[WEATHER], tool_choice="required")
    call = _call_of(first)
    messages.append(first.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny, 31 degrees"})
    for stream in (False, True):
        last = model.ask(messages, stream, tools=[WEATHER])
        if last.message.tool_calls:
            return "called again"
        if any(mark in (last.message.content or "") for mark in MARKUP):
            return "malformed call"  # by the model, which does not know the form
        if outcome := _oddity(last):
            return outcome
    return "ok"


def automatic_call(model: Model) -> str:
    choice = model.ask("Use the tool: what is the weather in Rome?", tools=[WEATHER])
    if not choice.message.tool_calls:
        return "not called"
    json.loads(choice.message.tool_calls[0].function.arguments)
    return "ok"


def thinking_off(model: Model) -> str:
    choice = model.ask("Say hello.", extra_body={"enable_thinking": False})
    if thought := getattr(choice.message, "reasoning_content", None):
        raise Failure(f"thinks anyway: {thought!r}")
    return _oddity(choice) or "ok"


def thinking_bounded(model: Model) -> str:
    """A spent budget closes the thought, and an answer follows."""
    question = "Why is the sky blue? Think first."
    answer = model.complete(question, extra_body={"enable_thinking": True})
    choice = answer.choices[0]
    thought = getattr(choice.message, "reasoning_content", None)
    if not thought:
        return "no thought"
    if thought != choice.message.reasoning:
        raise Failure("`reasoning` and `reasoning_content` differ")
    spent = answer.usage.completion_tokens_details.reasoning_tokens
    if spent > BUDGET + MAX_TAGS:
        raise Failure(f"{spent} tokens of reasoning")
    return _oddity(choice) or "ok"


def json_schema(model: Model) -> str:
    """Thinking or not."""
    for thinks in (None, False, True):
        extra = {} if thinks is None else {"enable_thinking": thinks}
        choice = model.ask("How many legs has a dog?", response_format=NUMBER, extra_body=extra)
        _check_number(choice)
    return "ok"


def schema_or_call(model: Model) -> str:
    choice = model.ask("How many legs has a dog?", tools=[WEATHER], response_format=NUMBER)
    if choice.message.tool_calls:
        _call_of(choice)
        return "called"
    _check_number(choice)
    return "ok"


CASES: tuple[Callable[[Model], str], ...] = (
    plain,
    forced_call,
    tool_loop,
    automatic_call,
    thinking_off,
    thinking_bounded,
    json_schema,
    schema_or_call,
)


def try_family(name: str) -> dict[str, str]:
    """Return what each case gave; a failure begins with `FAILED`."""
    results: dict[str, str] = {}
    with (
        with_template(TEMPLATES / f"{name}.jinja") as model,
        whole_stack(model, MODEL_CONTEXT="2048", MODEL_PARALLEL="2") as up,
        openai.OpenAI(base_url=f"{up.http.base_url}/v1", api_key="any", max_retries=0) as client,
    ):
        for case in CASES:
            began = time.monotonic()
            results[case.__name__] = _outcome(case, Model(client))
            seconds = time.monotonic() - began
            print(f"{name} {case.__name__}: {results[case.__name__]} ({seconds:.0f} s)", flush=True)
    return results


def _outcome(case: Callable[[Model], str], model: Model) -> str:
    try:
        return case(model)
    except (Failure, openai.OpenAIError, httpx.HTTPError, ValueError, LookupError) as error:
        return f"FAILED: {error}"


def _call_of(choice: Any) -> Any:
    if choice.finish_reason != "tool_calls" or len(choice.message.tool_calls or ()) != 1:
        raise Failure(f"{choice.finish_reason}, {choice.message.content!r}")
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    is_valid = isinstance(arguments["city"], str) and isinstance(arguments["days"], int)
    if call.function.name != "get_weather" or not is_valid:
        raise Failure(f"called {call.function.name} with {call.function.arguments}")
    return call


def _oddity(choice: Any) -> str:
    """
    Return what is odd about an answer, or "": a model that does not know a template may end at
    once, in its thought, or write markup of its own.
    """
    content = choice.message.content
    thought = getattr(choice.message, "reasoning_content", None)
    if any(mark in f"{content}{thought}" for mark in MARKUP):
        return "odd: markup"
    if content:
        return ""
    return "odd: ended in its thought" if thought else "odd: empty"


def _check_number(choice: Any) -> None:
    """Raise Failure unless the content is JSON as NUMBER wants it."""
    if choice.finish_reason != "stop" or type(json.loads(choice.message.content)["n"]) is not int:
        raise Failure(f"{choice.finish_reason}, no integer: {choice.message.content!r}")


def table(results: dict[str, dict[str, str]]) -> str:
    names = [case.__name__ for case in CASES]
    rows = [["template", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 1)]
    rows += [[name, *(found[each] for each in names)] for name, found in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try a real model with each family's template.")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names of templates")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--only-families", action="store_true", help="skip the long conversation")
    options = parser.parse_args(None if arguments is None else list(arguments))
    results = {name: try_family(name) for name in options.families.split(",")}
    lines = [] if options.only_families else whole_conversation.run(real_model())
    report = "\n\n".join([table(results), *lines])
    print(report)
    if options.save:
        RESULTS.write_text(f"# Real models\n\n{__doc__ or ''}\n\n{report}\n")
    outcomes = [each for found in results.values() for each in found.values()]
    is_odd = any("odd" in each for each in results.get(OWN, {}).values())
    return int(is_odd or any("FAILED" in each for each in [*outcomes, *lines]))


if __name__ == "__main__":
    sys.exit(main())
