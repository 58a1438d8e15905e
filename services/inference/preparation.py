"""What the model is to read for a request, and how it is to answer. Knows no bus."""

from os.path import commonprefix

from msgspec.structs import replace

from services.contract import prompts
from services.contract.errors import ServiceError
from services.contract.history import Context
from services.contract.messages import ChatRequest, ResumeState, Sampling
from services.inference import origins
from services.inference.calls import InFlightRequest
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.engine.output.generated_text import GeneratedText
from services.inference.engine.output.resume import resumed_answer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.prompt.chat_template import KnownAnswers, RenderedPrompt
from services.inference.engine.sampling import constraints
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.models import LoadedModel

MIN_ROOM = 1  # tokens that a prompt must leave for the answer; max_tokens is clamped to the room


def check_counts(model: LoadedModel, request: ChatRequest) -> None:
    """
    Reject a prompt that can't fit by counts alone, before any work. Raises
    ServiceError(context_length_exceeded).
    """
    field, least = _least_tokens(model, request)
    if not request.resume and least > model.backend.context:
        raise prompts.context_exceeded(field, f"at least {least}", model.backend.context)


def _least_tokens(model: LoadedModel, request: ChatRequest) -> tuple[str, int]:
    """
    Return the field of the prompt and a lower bound of its tokens, from the maximum bytes per
    token. Texts are stripped and assistant messages ignored, since templates may drop these parts.
    """
    if isinstance(request.text, tuple):
        return "prompt", len(request.text)
    messages = request.messages or ()
    texts = [message.text.strip() for message in messages if message.role != "assistant"]
    texts = texts if messages else [request.text or request.prompt.strip()]
    least = sum(len(text.encode()) for text in texts) // model.template.max_token_bytes
    return ("messages", max(least, len(messages))) if messages else ("prompt", least)


def prompt(
    model: LoadedModel,
    system: str,
    call: InFlightRequest,
    context: Context,
    answers: KnownAnswers,
    since: str,
) -> RenderedPrompt:
    """
    The session's next question after its context, or what the request brings. Raises ServiceError.
    """
    request = call.request
    if request.text is not None:
        found = model.template.raw_prompt(request.text, MIN_ROOM)
    elif request.messages is not None:
        tools = () if request.tool_choice == "none" else request.tools or ()
        found = model.template.conversation_prompt(request.messages, tools, MIN_ROOM, answers)
    else:
        turns, question, most = context.turns, request.prompt, call.sampling.max_tokens or 1
        found = model.template.session_prompt(system, turns, question, most, answers, since)
    if not found.tokens:
        raise ServiceError("invalid_request", "The chat template makes nothing of this prompt.")
    return found


def ahead(
    model: LoadedModel, system: str, call: InFlightRequest, context: Context, answers: KnownAnswers
) -> IdlePrompt | None:
    """
    All of the session's next prompt before its question, which is taken to be as long as the last
    one. `call.since` is where it begins then. None if that is where the last prompt began, or if
    that one was read in another way, for its seed; or if the session has gone on. Raises
    ServiceError.
    """
    turns, most = context.turns, call.sampling.max_tokens or 1
    is_newest = bool(turns) and turns[-1].request_id == call.request_id
    if not is_newest or call.request.seed is not None:
        return None
    likely = model.template.session_prompt(
        system, turns, call.request.prompt, most, answers, call.since
    )
    if not likely.kept or turns[likely.dropped].request_id == call.since:
        return None
    call.since = turns[likely.dropped].request_id
    other = model.template.session_prompt(system, turns[likely.dropped :], "", most, answers)
    known = list(commonprefix((likely.tokens, other.tokens)))
    session = prompts.conversation_key(call.tenant, call.request)
    return IdlePrompt(known, call.adapter, session, call.tenant)


def without(context: Context, retried: str | None) -> Context:
    """As the session was before the exchange that is retried. Raises ServiceError."""
    if retried is None:
        return context
    if retried != context.last:
        last = repr(context.last) if context.last else "none"
        raise ServiceError(
            "invalid_request",
            f"`retry_of` must name the session's last exchange, and that is {last}.",
        )
    turns = tuple(turn for turn in context.turns if turn.request_id != retried)
    return replace(context, turns=turns)


def sampling(model: LoadedModel, filled_in: Sampling, tokens: int) -> Sampling:
    """
    Return `filled_in` with `max_tokens` clamped to what a prompt of `tokens` tokens leaves of the
    context window.
    """
    room = model.backend.context - tokens
    return replace(filled_in, max_tokens=min(filled_in.max_tokens or room, room))


def _stops(model: LoadedModel, call: InFlightRequest) -> StopRules:
    strings = call.sampling.stop or ()
    if call.request.stop is not None:
        return StopRules.literal(strings)
    return StopRules.from_setting(strings, call.request.prompt, model.template.opens_reasoning)


def sequence(model: LoadedModel, call: InFlightRequest, origin: ResumeState) -> Sequence:
    """
    All that may take time before the engine, and all that can be wrong with what is asked of the
    answer: it raises ServiceError. For a thread of its own.
    """
    resume = call.request.resume
    if resume:
        origins.check(resume, call, model)
    tokens = origins.prompt(origin)
    call.sampling = sampling(model, call.sampling, len(tokens))
    sampler = model.backend.sampler(call.sampling, _call_form(model, call))
    stops = _stops(model, call)
    if resume:
        begun = resumed_answer(resume, call.sampling, sampler, model.backend, stops)
    else:
        begun = GeneratedText(call.sampling, stops)
    return Sequence(
        call.sequence_key,
        tokens,
        call.sampling,
        sampler,
        call.adapter,
        prompts.conversation_key(call.tenant, call.request),
        call.request.seed is not None,
        begun,
        call.tenant,
        received_at=call.received,
    )


def _call_form(model: LoadedModel, call: InFlightRequest) -> str | None:
    """Return the Lark of an answer that must, or may, be a tool call. Raises ServiceError."""
    request = call.request
    if not request.tools:
        return None
    answer, several = constraints.response_format_lark(call.sampling), request.parallel_tool_calls
    return model.template.tools.call_grammar(request.tools, request.tool_choice, several, answer)
