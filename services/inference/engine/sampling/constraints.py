"""Compiles what a request requires of its answer's text for one model, or rejects it."""

import json
from typing import Any

from services.contract.errors import ServiceError
from services.contract.messages import (
    MAX_SCHEMA_BYTES,
    JsonObjectFormat,
    JsonSchemaFormat,
    Sampling,
)
from services.inference.engine.sampling import gbnf, json_schema
from services.inference.engine.sampling.grammar import (
    Grammar,
    GrammarError,
    Vocabulary,
    compile_lark,
)

# Allow only as much white space as a person writes, so that no model fills an answer with it. Allow
# no `\u` escapes, with which a model could spell a declared key differently.
JSON_OPTIONS = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,40}", "json_allowed_escapes": 'nrbtf\\"'}


def compile_grammar(sampling: Sampling, lark: str | None, vocabulary: Vocabulary) -> Grammar | None:
    """
    Return the grammar of an answer, if it has one: of `lark`, as `ModelFormat.answer_lark` writes
    it, or of `response_format` or `grammar` alone. Takes as long as compile_lark. Raises
    ServiceError(invalid_request).
    """
    has_json = isinstance(sampling.response_format, JsonObjectFormat | JsonSchemaFormat)
    has_calls = bool(lark) and "\ncalls:" in (lark or "")
    fields = {"tools": has_calls, "grammar": sampling.grammar, "response_format": has_json}
    try:
        lark = lark or _plain_lark(sampling)
        return compile_lark(lark, vocabulary) if lark else None
    except GrammarError as error:
        names = "` or `".join(name for name, is_set in fields.items() if is_set)
        raise refusal(names, f"{error}.") from error


def _plain_lark(sampling: Sampling) -> str | None:
    answer = request_lark(sampling)
    return answer and f"start: answer\n{answer}"


def request_lark(sampling: Sampling) -> str | None:
    """
    Return Lark with the rule `answer` for the content that `response_format` or `grammar` asks for,
    or None. Raises ServiceError(invalid_request).
    """
    if response := response_format_lark(sampling):
        return f"answer: {response}"
    if not sampling.grammar:
        return None
    try:
        return gbnf.to_lark(sampling.grammar, "answer")
    except GrammarError as error:
        raise refusal("grammar", f"{error}.") from error


def response_format_lark(sampling: Sampling) -> str | None:
    """
    Return Lark for a `response_format` of JSON, or None for any other. Raises
    ServiceError(invalid_request).
    """
    match sampling.response_format:
        case JsonObjectFormat():
            return schema_lark({"type": "object"}, True, "response_format")
        case JsonSchemaFormat(asked):
            return schema_lark(asked.schema, bool(asked.strict), "response_format")
        case _:
            return None


def schema_lark(schema: dict[str, Any], is_strict: bool, field: str) -> str:
    """
    Return Lark for JSON that matches the schema. Raises ServiceError(invalid_request) if it is too
    long, too expensive, or strict with a keyword that can't be enforced.
    """
    if (size := len(json.dumps(schema).encode())) > MAX_SCHEMA_BYTES:
        raise refusal(field, f"its schema has {size:,} bytes; the maximum is {MAX_SCHEMA_BYTES:,}.")
    check_cost(schema, field)
    enforceable, ignored = json_schema.enforceable(schema)
    if is_strict and ignored:
        raise refusal(
            field,
            f"its schema's `{ignored[0]}` can't be enforced. Remove it, or send the schema without"
            " `strict`, which ignores it.",
        )
    options = {"x-guidance": JSON_OPTIONS | {"coerce_one_of": not is_strict}}
    return f"%json {json.dumps(enforceable | options, ensure_ascii=False)}"


def check_cost(schema: dict[str, Any], field: str) -> None:
    """Raise ServiceError(invalid_request) for a schema that would take minutes to compile."""
    if reason := json_schema.excessive_cost(schema):
        raise refusal(field, f"in its schema, {reason}. Leave some of them out.")


def check_logit_bias(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Raise ServiceError(invalid_request) if a token is not in the vocabulary."""
    for token in sampling.logit_bias or ():
        if int(token) >= len(vocabulary):
            raise ServiceError(
                "invalid_request",
                f"The field `logit_bias` has the token {token}, but the model's last token is"
                f" {len(vocabulary) - 1}. Remove it.",
            )


def refusal(field: str, reason: str) -> ServiceError:
    """Return the error for a field that can't be used."""
    return ServiceError("invalid_request", f"The field `{field}` can't be used: {reason}")
