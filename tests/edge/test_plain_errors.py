import msgspec
import pytest

from services.contract.history import MessagesRequest
from services.contract.messages import PromptRequest
from services.edge.api.openai_requests import ChatCompletionBody
from services.edge.plain_errors import in_plain_words


@pytest.mark.parametrize(
    ("kind", "data", "plain"),
    [
        (PromptRequest, '{"prompt":1}', "The field `prompt` must be a string"),
        (ChatCompletionBody, "{}", "The field `messages` is missing"),
        (PromptRequest, "[]", "The JSON must be an object"),
        (PromptRequest, '{"prompt":"a', "The JSON is incomplete"),
        (
            PromptRequest,
            '{"prompt":"a","max_tokens":1.5}',
            "The field `max_tokens` must be an integer or null",
        ),
        (
            PromptRequest,
            '{"prompt":"a","temperature":9}',
            "The field `temperature` must be at most 5.0",
        ),
        (
            PromptRequest,
            '{"prompt":"a","temperature":1e999}',
            "The field `temperature` is out of range",
        ),
        (PromptRequest, '{"prompt":"a","stop":[1]}', "The field `stop[0]` must be a string"),
        (
            PromptRequest,
            '{"prompt":"a","session_id":"%s"}' % ("x" * 129),
            "The field `session_id` must have at most 128 characters",
        ),
        (
            PromptRequest,
            '{"prompt":"a","retry_of":"a b"}',
            "The field `retry_of` must be the request id of an exchange",
        ),
        (
            PromptRequest,
            '{"prompt":"a","logit_bias":{"a":1}}',
            "The keys of the field `logit_bias` must be token ids",
        ),
        (MessagesRequest, '{"before":"x"}', "The field `before` must be the `next` of an earlier"),
        (
            ChatCompletionBody,
            '{"messages":[{"role":"x"}]}',
            "The field `messages[0].role` can't be 'x'",
        ),
        (
            ChatCompletionBody,
            '{"messages":[{"role":"user","content":1}]}',
            "The field `messages[0].content` must be a string or a list or null",
        ),
    ],
)
def test_message_of_msgspec_is_put_in_plain_words(
    kind: type[msgspec.Struct], data: str, plain: str
) -> None:
    with pytest.raises(msgspec.DecodeError) as error:
        msgspec.json.decode(data, type=kind)
    assert in_plain_words(str(error.value)).startswith(plain)


def test_url_parameter_is_named_as_one() -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.convert({"limit": "abc"}, MessagesRequest, strict=False)
    message = in_plain_words(str(error.value), "URL parameter")
    assert message == "The URL parameter `limit` must be an integer"


def test_other_message_stays_as_it_is() -> None:
    message = "The prompt is blank. Send a text."
    assert in_plain_words(message) == message
