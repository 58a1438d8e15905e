"""Builds the prompt of a request, with its sampling, stop rules and grammar."""

import hashlib
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple, Self

import numpy as np
from msgspec.structs import replace

from services.contract import prompts
from services.contract.answer import Answer
from services.contract.errors import ServiceError
from services.contract.history import Context
from services.contract.messages import Channel, ChatRequest, Resume, ResumeState, Sampling, Turn
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.parts import ContentDelta, ReasoningDelta
from services.inference.engine.output.resume import check_token_ids, restore_answer, token_ids
from services.inference.engine.output.stops import StopRules
from services.inference.engine.prompt.chat_template import (
    KnownAnswers,
    RenderedPrompt,
)
from services.inference.engine.sampling import constraints
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.in_flight import InFlightRequest
from services.inference.models import LoadedModel
from services.inference.state_folder import KeptAnswer

MIN_ROOM = 1  # tokens that a prompt must leave for the answer, whose limit is clamped to the room
ENTRY_TOKENS = 110  # memory of a cached answer beside its tokens, counted in tokens


@dataclass(frozen=True)
class PreparedPrompt:
    """
    A prompt and how it is answered. `first_exchange` is the request id of the first exchange in the
    prompt, the request's own if there is none before, or "" if another worker built the prompt.
    """

    tokens: list[int]
    adapter: int
    sampling: Sampling  # complete
    limits: AnswerLimits  # which fit the context window
    stops: StopRules
    lark: str | None  # grammar of the answer, if it is constrained
    resume_state: ResumeState
    first_exchange: str


class PromptBuilder:
    """
    Builds prompts for one model. The methods may be called in any thread; all but `remember` and
    `check_length` may take seconds. `system_prompt` is the default of sessions.
    """

    def __init__(
        self, model: LoadedModel, system_prompt: str, max_cached_answer_tokens: int
    ) -> None:
        self._model = model
        self._system_prompt = system_prompt
        self._answers = AnswerCache(max_cached_answer_tokens)
        template = model.template
        form = template.format.answer
        self._thought_opening = form.thought_opening(template.tokenize)
        self._thought_closing = template.reasoning_end
        if form.thought and not form.reasoning:  # the template does not show how it ends
            closing = form.thought.end + form.thought.between
            self._thought_closing = template.tokenize(closing, True)

    def build(self, flight: InFlightRequest, context: Context) -> PreparedPrompt:
        """
        Build the prompt of a request: the next question of its session after `context`, or what the
        request brings, or the prompt of the answer that it resumes. Raises ServiceError.
        """
        request = flight.request
        if request.resume:
            state, first = self._resumed(flight, request.resume), ""
        else:
            state, first = self._new(flight, context)
        tokens: list[int] = np.frombuffer(state.prompt, "<i4").tolist()
        thinks = not self._model.prompt_options(request).forbids_reasoning
        limits = _limits(flight.sampling, self._model.backend.context - len(tokens), thinks)
        sampling = replace(flight.sampling, max_completion_tokens=limits.total, seed=state.seed)
        stops = self._stops(request, sampling)
        lark = self._answer_lark(request, sampling, state.channel)
        adapter = flight.variant.number
        return PreparedPrompt(tokens, adapter, sampling, limits, stops, lark, state, first)

    def sequence(self, flight: InFlightRequest, prompt: PreparedPrompt) -> Sequence:
        """
        Return the engine's sequence for a prompt. Compiles the grammar, and replays the tokens of a
        resumed answer through the sampler. Raises ServiceError.
        """
        backend, resume = self._model.backend, flight.request.resume
        sampler = backend.sampler(prompt.sampling, prompt.lark, prompt.tokens)
        answer = self._new_answer(flight.request, prompt)
        if resume:
            restore_answer(answer, resume, sampler, backend)
        sampler.force(answer.take_forced())
        sampler.forbid(answer.forbidden)
        is_seeded = flight.request.seed is not None
        return Sequence(
            key=flight.sequence_key,
            prompt=prompt.tokens,
            sampling=prompt.sampling,
            sampler=sampler,
            answer=answer,
            adapter=prompt.adapter,
            session=prompts.conversation_key(flight.tenant, flight.request),
            is_deterministic=is_seeded,
            is_cache_used=backend.is_reuse_exact or not is_seeded,
            tenant=flight.tenant,
            stable_length=self._model.template.stable_length(prompt.tokens),
            received_at=flight.received_at,
        )

    def _new_answer(self, request: ChatRequest, prompt: PreparedPrompt) -> GeneratedAnswer:
        template = self._model.template
        return GeneratedAnswer(
            prompt.limits,
            prompt.stops,
            template.parser(request, prompt.resume_state.channel),
            {} if request.text is not None else template.markers,
            self._thought_closing,
            self._thought_opening,
            max_calls=1 if request.parallel_tool_calls is False else None,
        )

    def idle_prompt(self, flight: InFlightRequest, context: Context) -> IdlePrompt | None:
        """
        Return the part of the session's next prompt that is known before its question, if the
        context window moves on and the cached prefix can't be reused. The question is assumed to be
        as long as the last one.

        None if the window stays, if the session has continued already, or if the request has a
        seed, which needs a deterministic prefill. Raises ServiceError.
        """
        turns, max_tokens = context.turns, flight.sampling.max_tokens or 1
        is_newest = bool(turns) and turns[-1].request_id == flight.request_id
        if not is_newest or flight.request.seed is not None:
            return None
        system, template = self._system(context), self._model.template
        answers, first = self._known_of_session(flight.tenant, turns)
        question, options = flight.request.prompt, self._model.prompt_options(flight.request)
        options = options._replace(tool_results=(), prefix="")
        likely = template.session_prompt(
            system, turns, question, max_tokens, answers, first, options
        )
        kept = turns[likely.dropped :]
        if not kept or kept[0].request_id == first:
            return None
        other = template.session_prompt(system, kept, "", max_tokens, answers, options=options)
        self._answers.set_first_exchange(flight.tenant, flight.request_id, kept[0].request_id)
        known = list(commonprefix((likely.tokens, other.tokens)))
        session = prompts.conversation_key(flight.tenant, flight.request)
        return IdlePrompt(known, flight.variant.number, session, flight.tenant)

    def remember(
        self, flight: InFlightRequest, prompt: PreparedPrompt, answer: GeneratedAnswer
    ) -> None:
        """Cache the tokens of a finished answer, which the conversation's next prompt repeats."""
        tenant, key, content = flight.tenant, flight.session_key, answer.tokens_from(ContentDelta)
        has_own = prompts.is_stateless(flight.request)  # messages, and no ids of answers
        names = _Names.of_text(flight.answer) if has_own else _Names.of_id(flight.request_id)
        self._answers.add(tenant, names.content, content, prompt.first_exchange, key)
        if flight.answer.reasoning:
            reasoning = answer.tokens_from(ReasoningDelta)
            self._answers.add(tenant, names.reasoning, reasoning, session_key=key)

    def kept_answers(self) -> list[KeptAnswer]:
        """Return the cached answers, for the worker that serves next."""
        return self._answers.entries()

    def take_over(self, answers: Iterable[KeptAnswer]) -> None:
        """Cache the answers of the worker that served before."""
        for each in answers:
            tokens = array("i", each.tokens)
            self._answers.add(each.tenant, each.name, tokens, each.first_exchange, each.session_key)

    def forget_session(self, session_key: str) -> None:
        """Drop the cached answers of a session."""
        self._answers.forget_session(session_key)

    def check_length(self, request: ChatRequest) -> None:
        """
        Reject a prompt that can't fit by counts alone, before any work. Raises
        ServiceError(context_length_exceeded).
        """
        field, min_tokens = self._min_tokens(request)
        is_fixed = not request.resume and not request.drop_oldest
        if is_fixed and min_tokens > self._model.backend.context:
            raise prompts.context_exceeded(
                field, f"at least {min_tokens}", self._model.backend.context
            )

    def _min_tokens(self, request: ChatRequest) -> tuple[str, int]:
        """
        Return the field of the prompt and a lower bound of its tokens, from the maximum bytes per
        token. Texts are stripped and assistant messages ignored, since templates may drop both.
        """
        if isinstance(request.text, tuple):
            return "prompt", len(request.text)
        messages = request.messages or ()
        texts = [message.text.strip() for message in messages if message.role != "assistant"]
        texts = texts if messages else [request.text or request.prompt.strip()]
        count = sum(len(text.encode()) for text in texts) // self._model.template.max_token_bytes
        return ("messages", max(count, len(messages))) if messages else ("prompt", count)

    def _new(self, flight: InFlightRequest, context: Context) -> tuple[ResumeState, str]:
        """Return the resume state of a new answer and the first exchange in its prompt."""
        context = _without_retried(context, flight.request.retry_of)
        rendered = self._render(flight, context)
        if not rendered.tokens:
            raise ServiceError(
                "invalid_request",
                "The chat template renders an empty prompt: set MODEL_CHAT_TEMPLATE to another.",
            )
        seed = flight.request.seed
        state = ResumeState(
            model=self._model.info.digest,
            prompt=np.array(rendered.tokens, "<i4").tobytes(),
            exchanges_kept=rendered.kept,
            exchanges_dropped=rendered.dropped,
            seed=secrets.randbelow(2**32 - 1) if seed is None else seed,
            asked_at=flight.asked_at,
            epoch=context.epoch,
            applied_seq=context.applied_seq,
            channel=rendered.channel,
            adapter=flight.variant.adapter_digest,
        )
        if not rendered.kept:
            return state, flight.request_id
        return state, context.turns[rendered.dropped].request_id

    def _render(self, flight: InFlightRequest, context: Context) -> RenderedPrompt:
        request, template = flight.request, self._model.template
        if request.text is not None:
            return template.raw_prompt(request.text, MIN_ROOM)
        options = self._model.prompt_options(request)
        if request.messages is not None:
            past = [m for m in request.messages if m.role == "assistant"]
            texts = {_text_name(text): text for m in past for text in (m.text, m.reasoning or "")}
            known = self._known(flight.tenant, texts)
            if request.drop_oldest:
                max_tokens = flight.sampling.max_completion_tokens
                return template.truncated_prompt(
                    request.messages, options.tools, max_tokens, known, options
                )
            return template.conversation_prompt(
                request.messages, options.tools, MIN_ROOM, known, options
            )
        _check_results(request, context)
        answers, first = self._known_of_session(flight.tenant, context.turns)
        max_tokens = flight.sampling.max_tokens or 1
        return template.session_prompt(
            self._system(context),
            context.turns,
            request.prompt,
            max_tokens,
            answers,
            first,
            options,
        )

    def _known_of_session(self, tenant: str, turns: tuple[Turn, ...]) -> tuple[KnownAnswers, str]:
        """Return the cached answers by text, and the first exchange of the last prompt."""
        texts: dict[str, str] = {}
        for turn in turns:
            names = _Names.of_id(turn.request_id)
            texts |= {names.content: turn.response, names.reasoning: turn.reasoning}
        last = turns[-1].request_id if turns else ""
        return self._known(tenant, texts), self._answers.first_exchange(tenant, last)

    def _known(self, tenant: str, texts: Mapping[str, str]) -> KnownAnswers:
        """Return the cached tokens of these texts, which are given by name."""
        known = self._answers.get(tenant, texts)
        return {texts[name]: tokens for name, tokens in known.items()}

    def _system(self, context: Context) -> str:
        own = context.system_prompt
        return (self._system_prompt if own is None else own).strip()

    def _resumed(self, flight: InFlightRequest, resume: Resume) -> ResumeState:
        """
        Return the state of an answer that another worker has begun. Raises ServiceError
        (model_not_found, invalid_request or context_length_exceeded) if this one can't resume it.
        """
        state, backend = resume.state, self._model.backend
        digests = self._model.info.digest, flight.variant.adapter_digest
        if (state.model, state.adapter) != digests:
            message = "Another model began the answer: repeat the request without `resume`."
            raise ServiceError("model_not_found", message)
        if not state.prompt or len(state.prompt) % 4:
            message = "The prompt in `resume` ends inside a token: send `resume_state` unchanged."
            raise ServiceError("invalid_request", message)
        tokens = np.frombuffer(state.prompt, "<i4")
        check_token_ids(tokens.tolist(), backend)
        if len(tokens) + max(1, len(token_ids(resume))) > backend.context:
            message = (
                f"The resumed answer exceeds this worker's context window of {backend.context}"
                " tokens: give all workers the same MODEL_CONTEXT."
            )
            raise ServiceError("context_length_exceeded", message)
        return state

    def _stops(self, request: ChatRequest, sampling: Sampling) -> StopRules:
        strings = sampling.stop or ()
        if request.stop is not None:
            return StopRules.literal(strings)
        return StopRules.from_setting(strings, request.prompt)

    def _answer_lark(
        self, request: ChatRequest, sampling: Sampling, channel: Channel
    ) -> str | None:
        """Return the grammar of an answer with its reasoning and calls, if it has one."""
        if request.text is not None:
            return None
        template = self._model.template
        return template.format.answer_lark(
            request.tools or (),
            request.tool_choice,
            request.parallel_tool_calls,
            constraints.request_lark(sampling),
            channel,
            template.may_reason(self._model.prompt_options(request)),
        )


def _limits(sampling: Sampling, room: int, may_reason: bool) -> AnswerLimits:
    """
    Return the limits of an answer with `room` tokens left in the context window. Reasoning leaves
    room for as much content as is wanted, but at most for half. Without `may_reason` a thought is
    closed as soon as the prompt or the model opens it.
    """
    total = min(sampling.max_completion_tokens or room, room)
    content, budget = sampling.max_tokens, sampling.reasoning_budget_tokens
    budget = budget if may_reason else 0
    limits = [] if budget in (None, -1) else [budget]
    limits += [] if content is None else [total - min(content, total // 2)]
    reasoning = min(limits, default=None)
    minimum, may_loop = sampling.min_tokens or 0, bool(sampling.ignore_eos)
    return AnswerLimits(total, content, reasoning, minimum, may_loop)


def _check_results(request: ChatRequest, context: Context) -> None:
    """Raise ServiceError(invalid_request) for a result without its call in the last answer."""
    calls = {call.id for turn in context.turns[-1:] for call in turn.tool_calls}
    for result in request.tool_results or ():
        if result.tool_call_id not in calls:
            raise ServiceError(
                "invalid_request",
                f"The session's last answer has no tool call {result.tool_call_id!r:.100}: send the"
                " results of its calls as `tool_results`.",
            )


def _without_retried(context: Context, retry_of: str | None) -> Context:
    """Return the context before the exchange that is retried. Raises ServiceError."""
    if retry_of is None:
        return context
    if retry_of not in (context.last, context.unreplaced):
        last = repr(context.last) if context.last else "none"
        raise ServiceError(
            "invalid_request",
            f"`retry_of` must name the session's last exchange, and that is {last}.",
        )
    retried = context.retried_turn(retry_of)
    turns = tuple(turn for turn in context.turns if turn.request_id != retried)
    return replace(context, turns=turns)


class _CachedAnswer(NamedTuple):
    tokens: "array[int]"
    first_exchange: str
    session_key: str  # "" for a stateless request


class AnswerCache:
    """
    The tokens of recent answers, with the first exchange of each one's prompt, by tenant and name:
    a request id, or `_text_name` if the caller keeps the conversation. With them, the next prompt
    repeats the answer's exact tokens and reuses the cached prefix.

    The least recently used answers are evicted. A missing one only costs prefill.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._answers: OrderedDict[tuple[str, str], _CachedAnswer] = OrderedDict()
        self._lock = threading.Lock()

    def add(
        self,
        tenant: str,
        name: str,
        tokens: Iterable[int],
        first_exchange: str = "",
        session_key: str = "",
    ) -> None:
        """Add an answer; `tokens` without the end token."""
        with self._lock:
            self._remove((tenant, name))
            answer = _CachedAnswer(array("i", tokens), first_exchange, session_key)
            self._answers[tenant, name] = answer
            self._tokens += len(answer.tokens) + ENTRY_TOKENS
            while self._tokens > self._max_tokens:
                self._remove(next(iter(self._answers)))

    def get(self, tenant: str, names: Iterable[str]) -> "dict[str, array[int]]":
        """Return the tokens of those answers that are cached, by name."""
        with self._lock:
            keys = [key for name in names if (key := (tenant, name)) in self._answers]
            for key in keys:
                self._answers.move_to_end(key)
            return {key[1]: self._answers[key].tokens for key in keys}

    def first_exchange(self, tenant: str, name: str) -> str:
        """Return the first exchange in the prompt of an answer; "" if it is unknown."""
        answer = self._answers.get((tenant, name))
        return answer.first_exchange if answer else ""

    def set_first_exchange(self, tenant: str, name: str, first_exchange: str) -> None:
        """Record the first exchange of the next prompt, after idle prefill truncated it."""
        with self._lock:
            if answer := self._answers.get((tenant, name)):
                self._answers[tenant, name] = answer._replace(first_exchange=first_exchange)

    def entries(self) -> list[KeptAnswer]:
        """Return all answers, least recently used first."""
        with self._lock:
            return [
                KeptAnswer(*key, each.tokens.tobytes(), each.first_exchange, each.session_key)
                for key, each in self._answers.items()
            ]

    def forget_session(self, session_key: str) -> None:
        with self._lock:
            of_session = [k for k, each in self._answers.items() if each.session_key == session_key]
            for key in of_session:
                self._remove(key)

    def _remove(self, key: tuple[str, str]) -> None:
        if answer := self._answers.pop(key, None):
            self._tokens -= len(answer.tokens) + ENTRY_TOKENS


class _Names(NamedTuple):
    """The names of an answer's texts in the cache."""

    content: str
    reasoning: str

    @classmethod
    def of_id(cls, request_id: str) -> Self:
        return cls(request_id, f"{request_id}:reasoning")

    @classmethod
    def of_text(cls, answer: Answer) -> Self:
        return cls(_text_name(answer.content), _text_name(answer.reasoning))


def _text_name(text: str) -> str:
    """Name an answer by its text; no request id has a colon."""
    return "text:" + hashlib.sha256(text.encode()).hexdigest()
