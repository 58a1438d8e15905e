"""What a conversation brings to its next prompt. Knows no engine."""

import asyncio
from contextlib import suppress

from services.contract import prompts
from services.contract.errors import ServiceError
from services.contract.history import Context
from services.contract.messages import ResumeState
from services.inference import origins, preparation
from services.inference.answers import AnswerTokens
from services.inference.calls import InFlightRequest
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.engine.prompt.chat_template import KnownAnswers
from services.inference.models import LoadedModel
from services.inference.pool import Pool
from services.inference.sessions import HistoryClient

PATIENCE = 1.0  # seconds with history, where nobody waits for what it tells


class Conversations:
    """
    `system` is the system prompt of sessions that set none. Prompts are prepared in the `pool`.
    """

    def __init__(
        self, sessions: HistoryClient, model: LoadedModel, system: str, pool: Pool
    ) -> None:
        self._sessions = sessions
        self._model = model
        self._system = system
        self._pool = pool
        self._answers = AnswerTokens()

    async def begin(self, call: InFlightRequest) -> ResumeState:
        """Raises ServiceError, or Stopped."""
        context, answers = await self._find(call)
        since = self._answers.since(call.tenant, context.turns)
        system = self._system_of(context)
        prompt = await call.unless_stopped(
            self._pool.run(preparation.prompt, self._model, system, call, context, answers, since)
        )
        if prompt.kept:
            call.since = context.turns[prompt.dropped].request_id
        return origins.begun(call, self._model, context, prompt)

    async def _find(self, call: InFlightRequest) -> tuple[Context, KnownAnswers]:
        """What the session brings, if it is asked for, and the answers whose tokens are known."""
        request = call.request
        if prompts.is_stateless(request):
            return Context(), self._answers.of_texts(call.tenant, request.messages or ())
        context = await call.unless_stopped(self._sessions.context(call.tenant, request.session_id))
        context = preparation.without(context, request.retry_of)
        return context, self._answers.of(call.tenant, context.turns)

    def _system_of(self, context: Context) -> str:
        own = context.system_prompt
        return (self._system if own is None else own).strip()

    def remember(self, call: InFlightRequest, tokens: list[int]) -> None:
        """The answer's tokens, which the next turn's prompt repeats."""
        if tokens and self._model.backend.is_end(tokens[-1]):
            tokens = tokens[:-1]
        if prompts.is_stateless(call.request):
            self._answers.remember_text(call.tenant, call.text, tokens)
        else:
            self._answers.remember(call.tenant, call.request_id, tokens, call.since)

    async def ahead(self, call: InFlightRequest) -> IdlePrompt | None:
        """
        What the session's next prompt will begin with, if that is not what this one did: the window
        is cut before it. What is wrong is told to who asks the next question.
        """
        with suppress(ServiceError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                context = await self._sessions.context(call.tenant, call.request.session_id)
            answers = self._answers.of(call.tenant, context.turns)
            beginning = await self._pool.run(
                preparation.ahead, self._model, self._system_of(context), call, context, answers
            )
            self._answers.begin(call.tenant, call.request_id, call.since)
            return beginning
        return None
