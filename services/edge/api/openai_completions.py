"""`POST /v1/completions`: requests to workers, and their answers as choices of plain text."""

from collections.abc import Iterator
from itertools import accumulate, chain, islice

from litestar import post
from litestar.types import ASGIApp

from services.contract.answer import text_of
from services.contract.errors import ServiceError
from services.contract.messages import AnswerEvent, ChatRequest, Done
from services.edge.api.completion import TEXT, check_length, respond, session_of
from services.edge.api.objects import TextChoice, TextLogprobs, finish_reason_of
from services.edge.api.openai_requests import CompletionBody
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest

MAX_CHOICES = 64  # for all prompts: as many as a worker's queue holds


@post("/v1/completions", status_code=200)
async def completions(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, CompletionBody)
    for prompt in body.prompts:
        if not isinstance(prompt, str):
            check_length(edge, tenant, "prompt", len(prompt), body.model)
    prompts = text_requests(body, session_of(request, body))
    echoes = [str(p.text) if body.echo else "" for p in prompts for _ in range(body.n or 1)]
    choices = [TextChoiceBuilder(index, echo) for index, echo in enumerate(echoes)]
    return await respond(request, edge, tenant, TEXT, body, prompts, choices)


def text_requests(body: CompletionBody, session_id: str) -> list[ChatRequest]:
    """
    Return a request for each prompt. Raises ServiceError(invalid_request) for fields that
    contradict each other.
    """
    if (choices := len(body.prompts) * (body.n or 1)) > MAX_CHOICES:
        raise ServiceError(
            "invalid_request",
            f"The field `n` makes {choices} choices for all prompts; the maximum is {MAX_CHOICES}.",
        )
    if body.echo and any(not isinstance(prompt, str) for prompt in body.prompts):
        raise ServiceError("invalid_request", "The field `echo` is for prompts that are text.")
    if body.echo and body.logprobs is not None:
        raise ServiceError(
            "invalid_request",
            "The field `echo` can't be combined with logprobs: those of a prompt are not computed.",
        )
    return [
        ChatRequest(**body.sampling, model=body.model, session_id=session_id, text=prompt)
        for prompt in body.prompts
    ]


class TextChoiceBuilder:
    """
    A ChoiceBuilder. `echo` is the prompt if it should precede the answer, else empty. A text has no
    channels.
    """

    def __init__(self, index: int, echo: str) -> None:
        self._index = index
        self._echo = echo
        self._events: list[AnswerEvent] = []

    def begin(self) -> Iterator[TextChoice]:
        if self._echo:
            yield TextChoice(self._index, self._echo)

    def chunks(self, event: AnswerEvent) -> Iterator[TextChoice]:
        yield TextChoice(self._index, text_of(event), _logprobs(event))

    def end(self, done: Done) -> Iterator[TextChoice]:
        yield TextChoice(self._index, "", finish_reason=finish_reason_of(done))

    def add(self, event: AnswerEvent) -> None:
        self._events.append(event)

    def build(self, done: Done) -> TextChoice:
        text = self._echo + "".join(map(text_of, self._events))
        parts = [*filter(None, map(_logprobs, self._events))]
        logprobs = _join(parts) if parts else None
        return TextChoice(self._index, text, logprobs, finish_reason_of(done))


def _logprobs(event: AnswerEvent) -> TextLogprobs | None:
    if event.logprobs is None:
        return None
    offsets = accumulate((len(each.text) for each in event.logprobs), initial=event.offset)
    return TextLogprobs(
        tuple(each.text for each in event.logprobs),
        tuple(each.logprob for each in event.logprobs),
        tuple({likely.text: likely.logprob for likely in each.top} for each in event.logprobs),
        tuple(islice(offsets, len(event.logprobs))),
    )


def _join(parts: list[TextLogprobs]) -> TextLogprobs:
    fields = ((getattr(part, name) for part in parts) for name in TextLogprobs.__struct_fields__)
    return TextLogprobs(*(tuple(chain.from_iterable(field)) for field in fields))
