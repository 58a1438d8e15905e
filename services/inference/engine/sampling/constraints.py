"""What a request asks of its answer beyond likelihood, made ready for one model or refused."""

import json
from typing import Any

from services.contract import schemas
from services.contract.errors import ServiceError
from services.contract.messages import JsonObjectFormat, JsonSchemaFormat, Sampling
from services.inference.engine.sampling import gbnf
from services.inference.engine.sampling.grammar import Grammar, GrammarError, compile_lark
from services.inference.engine.sampling.vocabulary import Vocabulary

MAX_SCHEMA_BYTES = 2**17
# Allow only as much white space as a person writes, so that no model fills an answer with it. Allow
# no `\u` escapes, with which a model could spell a declared key differently.
JSON_OPTIONS = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,40}", "json_allowed_escapes": 'nrbtf\\"'}


def grammar(sampling: Sampling, call: str | None, vocabulary: Vocabulary) -> Grammar | None:
    """
    Return the grammar of an answer, if any: of `call`, the Lark of `Functions.call`, or of the
    format in the request. Takes as long as compile_lark. Raises ServiceError(invalid_request).
    """
    fields = {"tools": call, "grammar": sampling.grammar, "response_format": _is_json(sampling)}
    field = "` or `".join(name for name, asked in fields.items() if asked)
    try:
        lark = call or _lark(sampling)
        return compile_lark(lark, vocabulary) if lark else None
    except GrammarError as error:
        raise _refusal(field, f"{error}.") from error


def json_lark(schema: dict[str, Any], is_strict: bool, field: str) -> str:
    """
    Return Lark for JSON that matches the schema. Raises ServiceError(invalid_request) if it is too
    long, or strict with a keyword that can't be enforced.
    """
    if (size := len(json.dumps(schema).encode())) > MAX_SCHEMA_BYTES:
        raise _refusal(
            field, f"its schema has {size:,} bytes; the maximum is {MAX_SCHEMA_BYTES:,}."
        )
    check_cost(schema, field)
    held, left_out = schemas.held(schema)
    if is_strict and left_out:
        raise _refusal(
            field,
            f"its schema's `{left_out[0]}` can't be enforced. Remove it, or send the schema without"
            " `strict`, which ignores it.",
        )
    options = JSON_OPTIONS | {"coerce_one_of": not is_strict}
    return f"%json {json.dumps(held | {'x-guidance': options}, ensure_ascii=False)}"


def check_cost(schema: dict[str, Any], field: str) -> None:
    """Raises ServiceError(invalid_request) for a schema that would be compiled for minutes."""
    if too_much := schemas.excess(schema):
        raise _refusal(field, f"in its schema, {too_much}. Leave some of them out.")


def _refusal(field: str, why: str) -> ServiceError:
    return ServiceError("invalid_request", f"The field `{field}` can't be used: {why}")


def check_bias(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Raises ServiceError(invalid_request)."""
    for token in sampling.logit_bias or ():
        if int(token) >= len(vocabulary):
            raise ServiceError(
                "invalid_request",
                f"The field `logit_bias` names the token {token}, and the model's last one is"
                f" {len(vocabulary) - 1}.",
            )


def _is_json(sampling: Sampling) -> bool:
    return isinstance(sampling.response_format, JsonObjectFormat | JsonSchemaFormat)


def answer_lark(sampling: Sampling) -> str | None:
    """
    Return Lark for a `response_format` of JSON, or None for any other. Raises
    ServiceError(invalid_request).
    """
    match sampling.response_format:
        case JsonObjectFormat():
            return json_lark({"type": "object"}, True, "response_format")
        case JsonSchemaFormat(json_schema):
            return json_lark(json_schema.schema, bool(json_schema.strict), "response_format")
        case _:
            return None


def _lark(sampling: Sampling) -> str | None:
    if answer := answer_lark(sampling):
        return f"start: {answer}"
    return gbnf.to_lark(sampling.grammar) if sampling.grammar else None
