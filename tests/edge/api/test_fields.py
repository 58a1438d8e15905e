"""Which bodies of /v1 are accepted, and what each field does: one line per case."""

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest

from services.contract.messages import ChatRequest
from services.edge.api import fields
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
from tests.fakes import HELLO, direct_worker, report, reporting, scripted_worker

U = {"role": "user", "content": "hello"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def with_call(**more: Any) -> dict[str, Any]:
    return {"messages": [U, {"role": "assistant", "tool_calls": [CALL | more]}, RESULT]}


def answered(**more: Any) -> dict[str, Any]:
    return {"messages": [U, {"role": "assistant", **more}, U]}


def continued(answer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Continue an answer, unless `more` says otherwise."""
    last = {"role": "assistant"} | (answer or {"content": "x"})
    return {"messages": [U, last], "continue_final_message": True} | more


# body, fields of the request on the bus, names in X-Ignored-Fields
ACCEPTED_BODIES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # of OpenAI
    ({"store": True, "metadata": {"a": "1"}}, {}, "store, metadata"),
    ({"reasoning_effort": "low", "verbosity": "low"}, {"reasoning_effort": "low"}, "verbosity"),
    ({"service_tier": "flex", "safety_identifier": "u"}, {}, "service_tier, safety_identifier"),
    ({"prediction": {"type": "content", "content": "x"}}, {}, "prediction"),
    ({"prompt_cache_key": "k" * 200}, {}, ""),
    ({"stream_options": {"include_usage": True}}, {}, ""),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {},
        "stream_options.include_obfuscation",
    ),
    ({"modalities": ["text"], "n": 1.0, "best_of": 1}, {}, ""),
    # limits and sampling
    ({"max_tokens": -1}, {"max_completion_tokens": None}, ""),
    ({"max_completion_tokens": -1}, {"max_completion_tokens": None}, ""),
    ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_completion_tokens": 5}, ""),
    ({"max_tokens": 2**40}, {"max_completion_tokens": 1_000_000}, ""),
    ({"max_tokens": 12.0, "top_k": 40.0}, {"max_completion_tokens": 12, "top_k": 40}, ""),
    ({"n_predict": 5}, {"max_completion_tokens": 5}, ""),
    ({"top_p": 0, "top_k": -1}, {"top_p": 1e-6, "top_k": 0}, ""),
    ({"seed": -1}, {"seed": None}, ""),
    ({"seed": 42}, {"seed": 42}, ""),
    ({"seed": 2**40 + 7}, {"seed": (2**40 + 7) % (2**32 - 1)}, ""),
    ({"seed": -(2**62)}, {"seed": -(2**62) % (2**32 - 1)}, ""),
    ({"random_seed": 3.0}, {"seed": 3}, ""),
    ({"repetition_penalty": 1.2}, {"repeat_penalty": 1.2}, ""),
    ({"stop": ""}, {"stop": None}, ""),
    ({"stop": ["\n", ""]}, {"stop": ("\n",)}, ""),
    ({"stop": "x" * 1000}, {"stop": ("x" * 1000,)}, ""),
    ({"top_logprobs": 0}, {"logprobs": None}, ""),
    ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}, ""),
    (
        {"n_keep": 1, "samplers": ["top_k"], "cache_prompt": True},
        {},
        "n_keep, samplers, cache_prompt",
    ),
    # samplers of llama.cpp
    *(
        ({name: value}, {name: value}, "")
        for name, value in {
            "repeat_last_n": 128,
            "dry_multiplier": 0.8,
            "dry_base": 2.0,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": -1,
            "dry_sequence_breakers": ["\n", ":"],
            "top_n_sigma": 1.5,
            "typical_p": 0.9,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.2,
            "dynatemp_range": 0.5,
            "dynatemp_exponent": 1.5,
            "mirostat": 2,
            "mirostat_tau": 4.0,
            "mirostat_eta": 0.2,
            "min_keep": 2,
            "min_tokens": 4,
            "ignore_eos": True,
        }.items()
    ),
    ({"typ_p": 0.9}, {"typical_p": 0.9}, ""),
    ({"typical": 0.9, "typical_p": 0.8}, {"typical_p": 0.8}, ""),
    ({"nsigma": -1, "mirostat_mode": 2.0}, {"top_n_sigma": -1, "mirostat": 2}, ""),
    ({"top_n_sigma": -7.5, "dry_base": 0}, {"top_n_sigma": -1, "dry_base": None}, ""),
    ({"min_tokens": -1, "min_keep": 2.0}, {"min_tokens": 0, "min_keep": 2}, ""),
    (
        {"typical_p": -1, "xtc_probability": -1, "dynatemp_range": -1.0, "dry_multiplier": -1},
        {"typical_p": 0, "xtc_probability": 0, "dynatemp_range": 0, "dry_multiplier": 0},
        "",
    ),
    ({"repeat_last_n": 2**31 - 1}, {"repeat_last_n": 1_000_000}, ""),
    ({"dry_sequence_breakers": '["\\n", "*"]'}, {"dry_sequence_breakers": ["\n", "*"]}, ""),
    ({"dry_sequence_breakers": '"\\n", ":"'}, {"dry_sequence_breakers": ["\n", ":"]}, ""),
    ({"dry_sequence_breakers": []}, {"dry_sequence_breakers": []}, ""),
    ({"ignore_eos": False, "mirostat": 0}, {"ignore_eos": False, "mirostat": 0}, ""),
    ({"mood": "good", "reasoning_format": "none"}, {}, "mood, reasoning_format"),
    ({"evil\r\nx: y": 1}, {}, "evil??x??y"),
    ({"model": ""}, {"model": None}, ""),
    # reasoning
    ({"reasoning_effort": ""}, {"reasoning_effort": None}, ""),
    ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": None}, ""),
    ({"chat_template_kwargs": {"a": [1]}}, {"chat_template_kwargs": {"a": [1]}}, ""),
    ({"enable_thinking": False}, {"enable_thinking": False}, ""),
    *(
        ({name: 100.0}, {"reasoning_budget_tokens": 100}, "")
        for name in ("reasoning_budget_tokens", *fields.BUDGET_SYNONYMS)
    ),
    ({"thinking_budget": 2**40}, {"reasoning_budget_tokens": 1_000_000}, ""),
    ({"thinking_budget": -1}, {"reasoning_budget_tokens": -1}, ""),
    ({"thinking_budget": 0}, {"reasoning_budget_tokens": 0}, ""),
    (
        {"reasoning_budget_tokens": 5, "thinking_budget": 6, "reasoning": {"max_tokens": 7}},
        {"reasoning_budget_tokens": 5},
        "",
    ),
    ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high", "enable_thinking": None}, ""),
    (
        {"reasoning": {"max_tokens": 9.0}},
        {"reasoning_budget_tokens": 9, "enable_thinking": True},
        "",
    ),
    (
        {"reasoning": {"enabled": False, "summary": "auto", "mood": 1}},
        {"enable_thinking": False},
        "reasoning.summary, reasoning.mood",
    ),
    ({"reasoning": {}}, {"reasoning_effort": None, "enable_thinking": None}, ""),
    (
        {"reasoning": {"effort": "low"}, "reasoning_effort": "high"},
        {"reasoning_effort": "high"},
        "",
    ),
    ({"think": False}, {"enable_thinking": False}, ""),
    ({"think": "medium"}, {"reasoning_effort": "medium"}, ""),
    ({"think": ""}, {"reasoning_effort": None}, ""),
    ({"thinking": True}, {"enable_thinking": True}, ""),
    ({"thinking": {"type": "adaptive"}}, {"enable_thinking": None}, ""),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"enable_thinking": True, "reasoning_budget_tokens": 1024},
        "",
    ),
    (  # as Dify sends it
        {
            "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
            "thinking": {"type": "disabled"},
        },
        {
            "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
            "enable_thinking": False,
        },
        "",
    ),
    ({"include_reasoning": False}, {}, ""),
    # prefill
    (continued(), {"continue_final": "content"}, ""),
    (continued(add_generation_prompt=False), {"continue_final": "content"}, ""),
    (continued(continue_final_message="content"), {"continue_final": "content"}, ""),
    (continued({"reasoning": "hm", "content": "x"}), {"continue_final": "content"}, ""),
    (continued({"reasoning": "hm"}), {"continue_final": "reasoning"}, ""),
    (
        continued({"reasoning": "hm", "content": ""}, continue_final_message="content"),
        {"continue_final": "content"},
        "",
    ),
    (
        continued({"reasoning": "hm"}, continue_final_message="reasoning_content"),
        {"continue_final": "reasoning"},
        "",
    ),
    (continued(continue_final_message=False), {"continue_final": None}, ""),
    (continued(continue_final_message=False, echo=True), {"continue_final": None}, "echo"),
    ({"add_generation_prompt": True}, {"continue_final": None}, ""),
    ({"add_generation_prompt": False}, {"continue_final": None}, "add_generation_prompt"),
    (
        continued({"content": "x", "prefix": True}, continue_final_message=None, echo=True),
        {"continue_final": "content"},
        "",
    ),
    (
        continued({"content": "x", "prefix": False}, continue_final_message=None),
        {"continue_final": None},
        "",
    ),
    (answered(content="x", prefix=True), {"continue_final": None}, "messages[].prefix"),
    # the format of the answer
    ({"response_format": {"type": "text"}}, {"response_format": None}, ""),
    ({"response_format": FORMAT}, {"response_format": FORMAT}, ""),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": FORMAT},
        "",
    ),
    (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": FORMAT},
        "",
    ),
    (
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": FORMAT},
        "",
    ),
    ({"json_schema": SCHEMA}, {"response_format": FORMAT}, ""),
    ({"guided_json": json.dumps(SCHEMA)}, {"response_format": FORMAT}, ""),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"response_format": FORMAT}, ""),
    ({"structured_outputs": {"choice": ["a", 'b"']}}, {"grammar": 'root ::= "a" | "b\\""'}, ""),
    ({"tools": [TOOL], "response_format": FORMAT}, {"response_format": FORMAT}, ""),
    # tools
    ({"tools": []}, {"tools": None}, ""),
    ({"tools": [], "tool_choice": "auto"}, {"tools": None, "tool_choice": "auto"}, ""),
    ({"tools": None, "tool_choice": None, "parallel_tool_calls": True}, {"tools": None}, ""),
    ({"tools": [TOOL, TOOL]}, {"tools": [TOOL]}, ""),
    ({"tools": [{"type": "function", **FUNCTION}]}, {"tools": [TOOL]}, ""),
    ({"tools": [TOOL | {"cache_control": {"type": "x"}}]}, {}, "tools[].cache_control"),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"title": "t"}}]},
        {"tools": [TOOL]},
        "tools[].function.title",
    ),
    *(
        ({"tools": [{"type": "function", "function": {"name": name}}]}, {}, "")
        for name in ("a/b", "a:b", "a" * 200, "Zeit?")
    ),
    ({"tools": [TOOL], "tool_choice": "any"}, {"tool_choice": "required"}, ""),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "",
    ),
    (
        {
            "tools": [TOOL, {"type": "function", "function": {"name": "g"}}],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [TOOL]},
            },
        },
        {"tools": [TOOL], "tool_choice": "required"},
        "",
    ),
    # messages
    ({"messages": [U | {"name": "Bob Smith"}, U | {"name": "Jürgen"}]}, {}, ""),
    ({"messages": [U | {"cache_control": {"type": "x"}}]}, {}, "messages[].cache_control"),
    ({"messages": [{"role": "user", "content": None}]}, {}, ""),
    ({"messages": [{"role": "user", "content": ["hello"]}]}, {}, ""),
    ({"messages": [{"role": "user", "content": []}]}, {}, ""),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "a"},
                        {"type": "output_text", "text": "b", "annotations": [1]},
                        {"type": "refusal", "refusal": "c"},
                        {"type": "thinking", "thinking": "d"},
                    ],
                }
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": text} for text in "abc"]}
            ]
        },
        "messages[].content[].annotations, messages[].content[].thinking",
    ),
    (answered(content=None), {}, ""),
    (answered(), {}, ""),
    (answered(content=None, refusal="no"), {"messages": answered(content="no")["messages"]}, ""),
    (answered(content="x", tool_calls=[], function_call=None), {}, ""),
    *(
        (
            answered(content="x", **given),
            {"messages": answered(content="x", reasoning="hm")["messages"]},
            "",
        )
        for given in (
            {"reasoning_content": "hm"},
            {"reasoning": "hm"},
            {"reasoning_text": "hm"},
            {"thinking": "hm"},
            {"reasoning_content": "", "reasoning": None, "thinking": "hm"},
            {"reasoning_content": "hm", "reasoning": "other"},
            {"reasoning": {"text": "hm"}},
            {"reasoning": {"summary": None, "content": ["h", {"text": "m"}]}},
            {"reasoning_details": [{"type": "reasoning.text", "text": "h"}, {"summary": "m"}]},
            {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]},
        )
    ),
    *(
        (
            answered(content=[part, {"type": "text", "text": "x"}]),
            {
                "messages": answered(content=[{"type": "text", "text": "x"}], reasoning="hm")[
                    "messages"
                ]
            },
            "",
        )
        for part in (
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "reasoning", "text": "hm"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        )
    ),
    (
        answered(content=[{"type": "redacted_thinking", "data": "s"}, "x"], reasoning=5),
        {"messages": answered(content=[{"type": "text", "text": "x"}])["messages"]},
        "messages[].reasoning, messages[].content[].redacted_thinking",
    ),
    (
        {"messages": [U | {"reasoning": "hm"}]},
        {"messages": [U]},
        "messages[].reasoning",
    ),
    (answered(content="x", something="new"), {}, "messages[].something"),
    (with_call(index=0), {"messages": with_call()["messages"]}, "messages[].tool_calls[].index"),
    (
        with_call(function={"name": "f", "arguments": {"a": 1}}),
        {"messages": with_call()["messages"]},
        "",
    ),
    *(
        (with_call(function={"name": "the sky", **arguments}), {}, "")
        for arguments in ({}, {"arguments": None}, {"arguments": [1]}, {"arguments": '{"a": '})
    ),
    (with_call(id=None), {}, ""),
    (with_call(id=1, function={"name": 5, "arguments": 6}), {}, ""),
    ({"structured_outputs": {"json": SCHEMA, "backend": "x"}}, {}, "structured_outputs.backend"),
    (with_call(id="c" * 300), {}, ""),
    (
        {
            "messages": [
                U,
                {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a":1}'}},
                {"role": "function", "name": "f", "content": "ok"},
            ]
        },
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [CALL | {"id": ""}]},
                {"role": "tool", "name": "f", "content": "ok"},
            ]
        },
        "",
    ),
    (
        {"messages": [U, {"role": "tool", "content": {"a": 1}}]},
        {"messages": [U, {"role": "tool", "content": '{"a":1}'}]},
        "",
    ),
    (with_call(type="custom", function=None, custom={"name": "f", "input": "x"}), {}, ""),
    (
        {"functions": [FUNCTION], "function_call": {"name": FUNCTION["name"]}},
        {
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": FUNCTION["name"]}},
            "parallel_tool_calls": False,
        },
        "",
    ),
    ({"functions": [FUNCTION], "function_call": "none"}, {"tool_choice": "none"}, ""),
    ({"functions": [FUNCTION], "tools": []}, {"tools": None}, "functions"),
    ({"functions": [], "function_call": "auto"}, {"tools": None}, ""),
]


@pytest.mark.parametrize(
    ("body", "asked", "ignored"), ACCEPTED_BODIES, ids=lambda case: str(case)[:60]
)
async def test_field_is_accepted_with_its_effect(
    http: httpx.AsyncClient,
    nats_url: str,
    body: dict[str, Any],
    asked: dict[str, Any],
    ignored: str,
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(CHAT, json={"model": "demo", "messages": [U], **body})
    assert got.status_code == 200, got.text
    assert got.headers.get("x-ignored-fields", "") == ignored
    ((_, request),) = worker.requests
    assert {name: sent(request, name) for name in asked} == asked


def sent(request: ChatRequest, name: str) -> Any:
    """Return it as JSON types, with lists for tuples."""
    value = getattr(request, name)
    if name == "dry_sequence_breakers":
        return list(value)
    if name in ("messages", "tools", "response_format", "tool_choice") and value is not None:
        return msgspec.json.decode(msgspec.json.encode(value))
    return value


# body, field named in the error
REJECTED_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"modalities": ["text", "audio"], "audio": {"voice": "x"}}, "audio"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a+"}}, "regex"),
    ({"structured_outputs": {"json": SCHEMA, "choice": ["a"]}}, "structured_outputs"),
    ({"guided_json": "{}}, 5"}, "guided_json"),
    ({"json_schema": SCHEMA, "response_format": FORMAT}, "json_schema"),
    ({"response_format": {"type": "sound"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"temperature": "0.5"}, "temperature"),
    ({"typ_p": 2}, "typ_p"),
    ({"xtc_probability": -2}, "xtc_probability"),
    ({"mirostat": 5}, "mirostat"),
    ({"repeat_last_n": -2}, "repeat_last_n"),
    ({"dry_sequence_breakers": "\n"}, "dry_sequence_breakers"),
    ({"dry_sequence_breakers": '"\\ud800"'}, "dry_sequence_breakers"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"seed": "x"}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
    ({"tools": "f"}, "tools"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"reasoning_effort": 5}, "reasoning_effort"),
    ({"reasoning_effort": "x" * 33}, "reasoning_effort"),
    ({"enable_thinking": "false"}, "enable_thinking"),
    ({"enable_thinking": 0}, "enable_thinking"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": "false"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking"),
    ({"thinking_budget": "x"}, "thinking_budget"),
    ({"thinking_budget_tokens": -2}, "thinking_budget_tokens"),
    ({"thinking_token_budget": 1.5}, "thinking_token_budget"),
    ({"reasoning": 5}, "reasoning"),
    ({"reasoning": []}, "reasoning"),
    ({"reasoning": {"effort": 5}}, "reasoning"),
    ({"reasoning": {"enabled": "yes"}}, "reasoning"),
    ({"reasoning": {"max_tokens": -2}}, "reasoning"),
    ({"think": 1}, "think"),
    ({"think": "x" * 33}, "think"),
    ({"thinking": {"type": "much"}}, "thinking"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    ({"continue_final_message": True}, "continue_final_message"),
    (continued(continue_final_message="yes"), "continue_final_message"),
    (continued(continue_final_message=1), "continue_final_message"),
    (continued(add_generation_prompt=True), "add_generation_prompt"),
    (continued({"tool_calls": [CALL]}), "continue_final_message"),
    (continued(continue_final_message="reasoning_content"), "continue_final_message"),
    (
        continued({"content": "x", "prefix": True}, continue_final_message=False),
        "continue_final_message",
    ),
    (continued({"content": "x", "prefix": "yes"}), "messages"),
    (continued(echo="yes"), "echo"),
    ({"echo": 1}, "echo"),
    ({"messages": [{"role": "user", "contents": "hello"}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": [U, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [U, RESULT | {"content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages"),
    ({"messages": [U] * 10_001}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), REJECTED_BODIES, ids=lambda case: str(case)[:60])
async def test_unsupported_field_is_rejected_by_name(
    http: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    got = await http.post(CHAT, json={"model": "demo", "messages": [U], **body})
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param


async def test_error_names_the_path_with_indexes(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    got = await http.post(CHAT, json={"messages": [U, {"role": "user", "content": parts}]})
    assert "at `$.messages[1].content[1]`" in got.json()["error"]["message"]
    got = await http.post(CHAT, json={"messages": [U, {"role": "user", "content": 5}]})
    assert "The field `messages[1].content` must be" in got.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_ignored_fields_are_named_for_completions_and_streams(
    http: httpx.AsyncClient, nats_url: str, stream: bool
) -> None:
    body = {"prompt": "once", "stream": stream, "mood": "good", "n_predict": 2}
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(TEXT, json=body)
    assert got.status_code == 200 and got.headers["x-ignored-fields"] == "mood"
    assert worker.requests[0][1].max_completion_tokens == 2


async def test_ignored_fields_header_is_bounded(http: httpx.AsyncClient, nats_url: str) -> None:
    more = {f"field{number:03}" + "x" * 200: 1 for number in range(500)}
    async with scripted_worker(nats_url, HELLO):
        got = await http.post(CHAT, json={"messages": [U], **more})
    assert got.status_code == 200
    header = got.headers["x-ignored-fields"]
    assert header.endswith("and 480 more") and len(header) < 2000


async def test_field_without_effect_is_logged_once(
    nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "services.edge.api.openai_body")
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as http:
        async with scripted_worker(nats_url, HELLO):
            for _ in range(2):
                await http.post(CHAT, json={"messages": [U], "mood": "good", "store": True})
    messages = [r.getMessage() for r in caplog.records if "field without effect" in r.getMessage()]
    assert [message.rpartition("name=")[2] for message in messages] == ["mood", "store"]


async def test_strict_edge_rejects_unknown_fields_only(
    nats_url: str,
) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, is_strict=True) as http:
        async with scripted_worker(nats_url, HELLO):
            taken = await http.post(CHAT, json={"messages": [U], "store": True})
            rejected = await http.post(CHAT, json={"messages": [U], "temprature": 1})
            deep = await http.post(CHAT, json={"messages": [U | {"contnet": "x"}]})
    assert (taken.status_code, taken.headers["x-ignored-fields"]) == (200, "store")
    assert (rejected.status_code, rejected.json()["error"]["param"]) == (400, "temprature")
    assert "Unknown field `contnet` - at `$.messages[]`" in deep.json()["error"]["message"]


async def test_unknown_name_stands_for_the_only_model_if_it_may(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus, takes_any_model=True) as http,
        direct_worker(nats_url, "w1", HELLO) as worker,
        reporting(bus, report("w1")),
    ):
        await until_ready(http)
        for name in ("gpt-4o", "demo"):
            got = await http.post(CHAT, json={"model": name, "messages": [U]})
            assert got.status_code == 200 and got.json()["model"] == "demo"
    assert [request.model for _, request in worker.requests] == [None, "demo"]


async def until_ready(http: httpx.AsyncClient) -> None:
    while (await http.get("/v1/models")).json()["data"] == []:
        await asyncio.sleep(0.01)


async def test_half_of_a_surrogate_pair_is_named_by_its_byte(http: httpx.AsyncClient) -> None:
    for text, at in (
        (rb"hi \ud83d", 45),
        (rb"hi \ud83d x", 45),
        (rb"\\\udc00", 44),
        (rb"\udc00", 42),
    ):
        body = b'{"messages": [{"role": "user", "content": "%b"}]}' % text
        got = await http.post(CHAT, content=body)
        assert got.status_code == 400
        message = got.json()["error"]["message"]
        assert f"at byte {at + 1} is half of a surrogate pair" in message, message


async def test_invalid_utf_8_is_named_by_its_byte(http: httpx.AsyncClient) -> None:
    body = b'{"store": true, "messages": [{"role": "user", "content": "gr\xfc\xdf"}]}'
    got = await http.post(CHAT, content=body)
    assert f"Byte {body.index(0xFC)} is not UTF-8" in got.json()["error"]["message"]


MIB = 2**20


def filled(before: str, item: str, after: str) -> bytes:
    """A body of nearly a MiB."""
    count = (MIB - 1000) // (len(item) + 1)
    return (before + ",".join([item] * count) + after).encode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, filled('{"prompt":[', "1", "]}")),
        (TEXT, filled('{"prompt":[', "[]", "]}")),
        (CHAT, filled('{"messages":[', "{}", "]}")),
        (CHAT, filled('{"messages":[', '{"role":"user","content":""}', "]}")),
        (CHAT, filled('{"messages":[{"role":"user","content":[', '""', "]}]}")),
        (CHAT, filled('{"messages":[{"role":"assistant","tool_calls":[', "{}", "]}]}")),
        (CHAT, filled('{"messages":[{"role":"assistant","reasoning_details":[', "[]", "]}]}")),
        (CHAT, filled('{"messages":[],"chat_template_kwargs":{"a":[', "[]", "]}}")),
        (CHAT, filled('{"messages":[],"reasoning":{"a":[', "[]", "]}}")),
        (CHAT, filled('{"messages":[],"tools":[', '{"name":"f"}', "]}")),
        (CHAT, filled('{"messages":[],"tools":[{"name":"f","parameters":{"a":[', "[]", "]}}]}")),
        (CHAT, filled('{"messages":[],"json_schema":{"enum":[', "[]", "]}}")),
        (CHAT, filled('{"messages":[],"guided_choice":[', '""', "]}")),
        (CHAT, filled('{"messages":[],"stop":[', "[]", "]}")),
        (CHAT, filled('{"messages":[],"tool_choice":[', "[]", "]}")),
        (CHAT, filled('{"messages":[],"logit_bias":{', '"1":1', "}}")),
    ],
    ids=lambda case: str(case)[:60],
)
async def test_body_of_too_many_elements_is_rejected(
    http: httpx.AsyncClient, path: str, body: bytes
) -> None:
    got = await http.post(path, content=body)
    assert got.status_code in (400, 413), got.text
    message = got.json()["error"]["message"]
    assert any(word in message for word in (" more than ", " bytes, ", " bytes; ", " at most "))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning_details", "content"])
async def test_deeply_nested_reasoning_is_accepted_or_rejected(
    http: httpx.AsyncClient, nats_url: str, name: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        for depth in (3, 5, 100, 900, 1000, 5000):
            for opening, closing in (("[", "]"), ('{"text":', "}"), ('[{"thinking":', "}]")):
                nested = opening * depth + '"x"' + closing * depth
                if name == "content":
                    nested = f'[{{"type":"thinking","thinking":{nested}}}]'
                body = f'{{"messages":[{{"role":"assistant","{name}":{nested}}}]}}'
                got = await http.post(CHAT, content=body.encode())
                assert got.status_code in (200, 400), got.text


async def test_ignored_field_is_not_decoded(http: httpx.AsyncClient, nats_url: str) -> None:
    body = filled('{"messages":[{"role":"user","content":"x"}],"mood":[', "[]", "]}")
    async with scripted_worker(nats_url, HELLO):
        got = await http.post(CHAT, content=body)
    assert got.status_code == 200 and got.headers["x-ignored-fields"] == "mood"


async def test_object_of_thousands_of_fields_is_rejected(http: httpx.AsyncClient) -> None:
    fields = {f"f{number}": 1 for number in range(2000)}
    for body in ({"messages": [U], **fields}, {"messages": [U | fields]}):
        got = await http.post(CHAT, json=body)
        assert got.status_code == 413 and "more than 1,000 fields" in got.text
