"""
The items of `/v1/responses`: input as it is stored, and both input and output as messages for the
model. https://platform.openai.com/docs/api-reference/responses
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from services.contract.conversation import ChatMessage, FunctionCall, TextPart, ToolCall
from services.contract.history import Exchange
from services.edge.api.openai_responses_objects import ResponseBuilder, heading_of

Item = dict[str, Any]
"""As the API returns it, but for references, which have only `type` and `id`."""

REFERENCE = "item_reference"
ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
_ITEM_ID = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{64})_(i?)([0-9]{1,6})")


class ItemPlace(NamedTuple):
    """Where an item is: in the input or the output of a response."""

    request_id: str
    is_input: bool
    number: int


def place_of(item_id: str) -> ItemPlace | None:
    """Return the place of an item by its id; None if it is no id of ours."""
    if found := _ITEM_ID.fullmatch(item_id):
        return ItemPlace(found[1], bool(found[2]), int(found[3]))
    return None


def with_ids(items: Iterable[Item], request_id: str) -> tuple[Item, ...]:
    """Return the input items of a response with ids, which tell their places."""
    return tuple(
        {"id": f"{ID_PREFIXES[item['type']]}_{request_id}_i{n}", **_without_id(item)}
        for n, item in enumerate(items)
    )


def message(role: str, texts: Iterable[str]) -> Item:
    kind: Item = {"type": "output_text"} if role == "assistant" else {"type": "input_text"}
    more: Item = {"annotations": []} if role == "assistant" else {}
    content = [{**kind, "text": text, **more} for text in texts]
    return {"type": "message", "role": role, "content": content, "status": "completed"}


def function_call(call_id: str, name: str, arguments: str) -> Item:
    fields = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"type": "function_call", **fields, "status": "completed"}


def function_call_output(call_id: str, output: str) -> Item:
    fields = {"call_id": call_id, "output": output}
    return {"type": "function_call_output", **fields, "status": "completed"}


def reasoning(text: str) -> Item:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": content, "status": "completed"}


def output_items(exchange: Exchange) -> list[Item]:
    """Return the output of a stored response."""
    builder = ResponseBuilder(heading_of(exchange.request_id, exchange.turn))
    for event in exchange.events():
        builder.push(event)
    builder.close(exchange.finish_reason)
    return builder.output


def input_items(exchange: Exchange) -> Sequence[Item]:
    """Return the input of a stored response; of an imported exchange, its prompt."""
    if exchange.turn is not None:
        return exchange.turn.input
    prompt = message("user", [exchange.prompt])
    return with_ids([prompt], exchange.request_id)


def items_of(exchanges: Iterable[Exchange]) -> list[Item]:
    """Return all items of these exchanges in their order."""
    return [item for each in exchanges for item in (*input_items(each), *_answer_items(each))]


def item_at(exchange: Exchange, place: ItemPlace) -> Item | None:
    items = input_items(exchange) if place.is_input else output_items(exchange)
    return items[place.number] if place.number < len(items) else None


def to_messages(items: Iterable[Item]) -> list[ChatMessage]:
    """
    Return the messages of a conversation. Reasoning, text and calls that follow one another in this
    order are one message of the assistant.
    """
    messages: list[ChatMessage] = []
    for item in items:
        new = _message(item)
        joined = _joined(messages[-1], new) if messages else None
        if joined is not None:
            messages[-1] = joined
        elif new is not None:
            messages.append(new)
    return messages


def _answer_items(exchange: Exchange) -> list[Item]:
    has_answer = bool(exchange.response or exchange.reasoning or exchange.tool_calls)
    return output_items(exchange) if has_answer else []


def _message(item: Item) -> ChatMessage | None:
    """Return None for an item without any text."""
    match item["type"]:
        case "message":
            texts = [str(part["text"]) for part in item["content"]]
            if item["role"] == "assistant" and not "".join(texts):
                return None
            parts = tuple(map(TextPart, texts))
            return ChatMessage(item["role"], texts[0] if len(texts) == 1 else parts)
        case "reasoning":
            text = "".join(part["text"] for part in item["content"])
            return ChatMessage("assistant", reasoning=text) if text else None
        case "function_call":
            function = FunctionCall(item["name"], item["arguments"])
            call = ToolCall(item["call_id"], function)
            return ChatMessage("assistant", tool_calls=(call,))
    return ChatMessage("tool", item["output"], tool_call_id=item["call_id"])


def _joined(last: ChatMessage, new: ChatMessage | None) -> ChatMessage | None:
    """Return the assistant's message with what follows in it; None if that begins another one."""
    if new is None or last.role != "assistant" or new.role != "assistant":
        return None
    if new.reasoning or (new.content is not None and (last.content or last.tool_calls)):
        return None
    return ChatMessage(
        "assistant",
        content=last.content if new.content is None else new.content,
        tool_calls=(*(last.tool_calls or ()), *(new.tool_calls or ())) or None,
        reasoning=last.reasoning,
    )


def _without_id(item: Item) -> Item:
    return {name: value for name, value in item.items() if name != "id"}
