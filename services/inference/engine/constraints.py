"""What a request asks of its answer beyond likelihood, made ready for one model or refused."""

from services.contract.errors import ServiceError
from services.contract.messages import JsonObjectFormat, JsonSchemaFormat, Sampling
from services.inference.engine import gbnf, schema
from services.inference.engine.grammar import Grammar
from services.inference.engine.vocabulary import Vocabulary


def grammar(sampling: Sampling, vocabulary: Vocabulary) -> Grammar | None:
    """What the answer must keep to, if anything. Raises ServiceError(invalid_request)."""
    try:
        text = _gbnf(sampling)
        return Grammar(gbnf.parse(text), vocabulary) if text else None
    except gbnf.GrammarError as error:
        field = "grammar" if sampling.grammar else "response_format"
        raise ServiceError(
            "invalid_request", f"The field `{field}` can't be used: {error}."
        ) from error


def _gbnf(sampling: Sampling) -> str | None:
    match sampling.response_format:
        case JsonObjectFormat():
            return schema.to_gbnf({"type": "object"})
        case JsonSchemaFormat(json_schema):
            return schema.to_gbnf(json_schema.schema)
        case _:
            return sampling.grammar


def check_bias(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Raises ServiceError(invalid_request)."""
    for token in sampling.logit_bias or ():
        if int(token) >= len(vocabulary):
            raise ServiceError(
                "invalid_request",
                f"The field `logit_bias` names the token {token}, and the model's last one is"
                f" {len(vocabulary) - 1}.",
            )
