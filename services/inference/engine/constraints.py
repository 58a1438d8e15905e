"""What a request asks of its answer beyond likelihood, made ready for one model or refused."""

from services.contract.errors import ServiceError
from services.contract.messages import JsonObjectFormat, JsonSchemaFormat, Sampling
from services.inference.engine import gbnf, schema
from services.inference.engine.grammar import Grammar
from services.inference.engine.vocabulary import Vocabulary


def grammar(sampling: Sampling, vocabulary: Vocabulary) -> Grammar | None:
    """What the answer must keep to, if anything. Raises ServiceError(invalid_request)."""
    name, text = "grammar", sampling.grammar
    try:
        match sampling.response_format:
            case JsonObjectFormat():
                text = schema.to_gbnf({"type": "object"})
            case JsonSchemaFormat(json_schema):
                name, text = "JSON schema", schema.to_gbnf(json_schema.schema)
        return Grammar(gbnf.parse(text), vocabulary) if text else None
    except gbnf.GrammarError as error:
        raise ServiceError("invalid_request", f"The {name} can't be used: {error}.") from error


def check_bias(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Raises ServiceError(invalid_request)."""
    for token in sampling.logit_bias or ():
        if int(token) >= len(vocabulary):
            raise ServiceError(
                "invalid_request",
                f"logit_bias names the token {token}, and the model's last one is"
                f" {len(vocabulary) - 1}.",
            )
