"""
Limits of API keys: parallel answers, requests and tokens per minute, counted across all edges.

Each edge publishes its counts after each change and every second, so that every edge can decide
alone. Requests that reach several edges within some milliseconds can exceed a limit. A request
reserves the tokens that it may need, and returns those that it did not use when it ends. What was
used in the last minute is estimated as

    used = previous minute x (1 - part of the current minute that is over) + current minute

as in https://blog.cloudflare.com/counting-things-a-lot-of-different-things/.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Literal, NamedTuple

from msgspec.structs import replace

from services.client.observer import AnswerObserver, ObserveEmbedding, ObserveTokens
from services.client.routing import WorkerDirectory, workers_of_model
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    ModelKind,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.contract.usage import EdgeUsage, TenantUsage
from services.edge.allowed_workers import AllowedWorkers
from services.edge.keys import ApiKey, ApiKeys
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import Fail, SupervisedLoop

MINUTE = 60.0
REPORT_SECONDS = 1.0
MIN_REPORT_SECONDS = 0.01
"""Between two messages: a burst of requests is published as one."""
LOST_SECONDS = 3.5
"""Without a message, after which running answers and reservations of an edge no longer count."""
BYTES_PER_TOKEN = 4
"""Of a prompt, as OpenAI estimates it for English."""
DEFAULT_ANSWER_TOKENS = 256
"""What a request without `max_tokens` reserves for its answer."""

Kind = Literal["requests", "tokens"]


class Window:
    """What was used in the last minute, counted in whole minutes of Unix time."""

    def __init__(self) -> None:
        self._minute = 0
        self._previous = self._current = 0

    def add(self, amount: int, minute: int) -> None:
        self._previous, self._current = self.counts(minute)
        self._minute = minute
        self._current += amount

    def counts(self, minute: int) -> tuple[int, int]:
        """Return the counts of the minute before this one and of this one."""
        return shifted((self._previous, self._current), minute - self._minute)


def shifted(counts: tuple[int, int], minutes: int) -> tuple[int, int]:
    """Return (previous, current) as seen this many minutes later."""
    if minutes <= 0:
        return counts
    return (counts[1], 0) if minutes == 1 else (0, 0)


class Use(NamedTuple):
    """What all edges together have used of a limit per minute; `elapsed` of the minute is over."""

    previous: int
    current: int
    elapsed: float  # seconds

    @property
    def used(self) -> float:
        return self.previous * (1 - self.elapsed / MINUTE) + self.current

    def seconds_until_below(self, limit: float) -> float:
        """Return the seconds after which `used` is below the limit, if nothing is added."""
        if self.used < limit:
            return 0.0
        if self.current < limit:
            return MINUTE * (1 - (limit - self.current) / self.previous) - self.elapsed
        return MINUTE - self.elapsed + MINUTE * (1 - limit / self.current)

    @property
    def seconds_until_unused(self) -> float:
        if self.current:
            return 2 * MINUTE - self.elapsed
        return MINUTE - self.elapsed if self.previous else 0.0


@dataclass
class TenantCounts:
    """What one tenant uses at this edge."""

    running: int = 0
    reserved: int = 0  # tokens
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)

    def usage(self, minute: int) -> TenantUsage:
        requests, tokens = self.requests.counts(minute), self.tokens.counts(minute)
        return TenantUsage(self.running, requests, tokens, self.reserved)


class Need(NamedTuple):
    """Tokens that a request may use."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


class Reservation:
    """Tokens that a request may still use. Release them when they were used, or are not needed."""

    def __init__(self, counts: TenantCounts, tokens: int) -> None:
        self._counts = counts
        self.tokens = tokens
        counts.reserved += tokens

    def release(self, tokens: int) -> None:
        """Release this number of tokens, or all that are left if they are fewer."""
        tokens = min(tokens, self.tokens)
        self.tokens -= tokens
        self._counts.reserved -= tokens


def steady_clock() -> Callable[[], float]:
    """
    Return a clock of Unix time that never jumps. If the system's clock were set back by an hour, a
    limit that is used up would stay so for an hour.
    """
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class RateLimits:
    """Holds the limits of `keys`. All methods are quick; tenants without limits cost nothing."""

    def __init__(
        self,
        bus: Bus,
        keys: ApiKeys,
        workers: WorkerDirectory,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` returns Unix time in seconds."""
        self._bus = bus
        self._keys = keys
        self._workers = workers
        self._clock = clock or steady_clock()
        self._edge_id = token_hex(8)
        self._own: dict[str, TenantCounts] = {}
        self._others: dict[str, tuple[float, EdgeUsage]] = {}  # by edge, with the time of arrival
        self._loop: SupervisedLoop | None = None

    @asynccontextmanager
    async def sharing(self, fail: Fail) -> AsyncIterator[None]:
        """Share counts with the other edges during the body. `fail` ends the process."""
        await self._bus.subscribe(subjects.usage(subjects.ANY), self._on_usage)
        self._loop = SupervisedLoop("sharing the use of API keys", self._share, fail)
        async with self._loop.running():
            yield

    def count_request(self, tenant: str) -> None:
        """Count a request. Raises ServiceError(rate_limit_exceeded) instead, if it is too many."""
        key = self._keys.limits(tenant)
        if key.requests_per_minute is None:
            return
        self._check(key, "requests")
        self._counts(tenant).requests.add(1, self._minute())
        self._publish_soon()

    def check_model(self, tenant: str, name: str | None, kind: ModelKind = "chat") -> None:
        """
        Raise ServiceError(model_not_found) if the tenant may not use the model. None is the default
        model of the kind.
        """
        key = self._keys.limits(tenant)
        if not key.models:
            return
        serving = workers_of_model(name, self._workers.reports(), kind=kind)
        chosen = name or next((report.name for report in serving), None)
        if chosen is not None and not key.allows(chosen):
            what = "the default model" if name is None else f"the model {name!r:.100}"
            raise ServiceError(
                "model_not_found",
                f"The API key of {tenant!r} may not use {what}: name one that GET /v1/models"
                " lists.",
            )
        if not serving and (name is None or self._workers.reports()):
            raise self.visible_workers(tenant).unavailable_error(name, kind)

    def visible_workers(self, tenant: str) -> WorkerDirectory:
        """Return the workers with those models and adapters that the tenant may use."""
        key = self._keys.limits(tenant)
        return AllowedWorkers(self._workers, key) if key.models else self._workers

    def observe(self, tenant: str, request: ChatRequest | None) -> AnswerObserver | None:
        """
        Begin to count an answer; None: it has no limits. Raises ServiceError if the tenant may not
        have it now. A reader that returns to an answer is counted, but never refused.
        """
        key = self._keys.limits(tenant)
        if request is not None:
            self.check_model(tenant, request.model)
        if key.parallel is None and key.tokens_per_minute is None:
            return None
        need = Need(0, 0)
        if request is not None:
            self._check_parallel(key)
            if key.tokens_per_minute is not None:
                need = self._estimate(request)
            self._check_reservation(key, need.total)
        counts = self._counts(tenant)
        counts.running += 1
        self._publish_soon()
        return CountedAnswer(self, counts, tenant, request, need)

    @contextmanager
    def embedding(self, tenant: str, size: int) -> Iterator[ObserveEmbedding]:
        """
        Reserve the tokens of an embedding or ranking of `size` bytes during the body. Yield what
        observes it. Raises ServiceError.
        """
        key, tokens = self._keys.limits(tenant), size // BYTES_PER_TOKEN
        self._check_reservation(key, tokens)
        is_limited = key.tokens_per_minute is not None
        reservation = Reservation(self._counts(tenant) if is_limited else TenantCounts(), tokens)
        self._publish_soon()

        def observe(model: str | None, kind: ModelKind) -> ObserveTokens:
            self.check_model(tenant, model, kind)
            return count

        def count(tokens: int) -> None:
            reservation.release(tokens)
            self.count_tokens(tenant, tokens)

        try:
            yield observe
        finally:
            reservation.release(reservation.tokens)
            self._publish_soon()

    def count_tokens(self, tenant: str, tokens: int) -> None:
        """Count tokens; other edges learn of them within a second."""
        if self._keys.limits(tenant).tokens_per_minute is not None:
            self._counts(tenant).tokens.add(tokens, self._minute())

    def end(self, tenant: str) -> None:
        """Count an answer of `observe` as ended."""
        self._counts(tenant).running -= 1
        self._publish_soon()

    def headers(self, tenant: str) -> Iterator[tuple[bytes, bytes]]:
        """
        Yield headers with the limits per minute, as OpenAI has them:
        https://developers.openai.com/api/docs/guides/rate-limits
        """
        for kind, limit in _limits_per_minute(self._keys.limits(tenant)):
            use = self._use(tenant, kind)
            if kind == "tokens":
                use = use._replace(current=use.current + self._reserved(tenant))
            figures = {
                "limit": str(limit),
                "remaining": str(max(0, math.floor(limit - use.used))),
                "reset": f"{use.seconds_until_unused:.3g}s",
            }
            for name, value in figures.items():
                yield f"x-ratelimit-{name}-{kind}".encode(), value.encode()

    def usage(self, tenant: str) -> tuple[int, int, int]:
        """Return running answers, and requests and tokens of the last minute, at all edges."""
        requests, tokens = self._use(tenant, "requests"), self._use(tenant, "tokens")
        return self._running(tenant), math.ceil(requests.used), math.ceil(tokens.used)

    # --- checks ---

    def _check_parallel(self, key: ApiKey) -> None:
        if key.parallel is None or self._running(key.name) < key.parallel:
            return
        raise ServiceError(
            "rate_limit_exceeded",
            f"The API key of {key.name!r} allows {key.parallel} parallel answers, which are"
            " running: wait until one ends.",
        )

    def _check_reservation(self, key: ApiKey, tokens: int) -> None:
        """
        Raise ServiceError(rate_limit_exceeded) if the limit is used up, or if other requests have
        reserved what a request needs. One request alone may exceed what is left, even the limit:
        `tokens` is an estimate, and the next request waits the longer.
        """
        self._check(key, "tokens")
        limit, reserved = key.tokens_per_minute, self._reserved(key.name)
        if limit is None or not reserved:
            return
        used = math.ceil(self._use(key.name, "tokens").used)
        if used + reserved + tokens > limit:
            raise ServiceError(
                "rate_limit_exceeded",
                f"The API key of {key.name!r} allows {limit} tokens per minute: {used} are used,"
                f" {reserved} are reserved for running requests, and this one may need {tokens}."
                " Wait until one ends, or send a smaller `max_tokens`.",
            )

    def _check(self, key: ApiKey, kind: Kind) -> None:
        limit = dict(_limits_per_minute(key)).get(kind)
        if limit is None:
            return
        wait = self._use(key.name, kind).seconds_until_below(limit)
        if wait > 0:
            seconds = max(1, math.ceil(wait))
            raise ServiceError(
                "rate_limit_exceeded",
                f"The API key of {key.name!r} allows {limit} {kind} per minute, which are used up:"
                f" try again in {seconds} s.",
                retry_after=seconds,
            )

    # --- counts of all edges ---

    def _use(self, tenant: str, kind: Kind) -> Use:
        minute = self._minute()
        previous, current = 0, 0
        for at, usage in self._usages(tenant, minute):
            counts = usage.requests if kind == "requests" else usage.tokens
            before, now = shifted(counts, minute - at)
            previous, current = previous + before, current + now
        return Use(previous, current, self._clock() - minute * MINUTE)

    def _usages(self, tenant: str, minute: int) -> Iterator[tuple[int, TenantUsage]]:
        """Yield the tenant's usage at each edge, with its minute."""
        if own := self._own.get(tenant):
            yield minute, own.usage(minute)
        for _, usage in self._others.values():
            if tenant in usage.tenants:
                yield usage.minute, usage.tenants[tenant]

    def _running(self, tenant: str) -> int:
        return sum(usage.running for usage in self._live_usages(tenant))

    def _reserved(self, tenant: str) -> int:
        """Return the tokens that running requests may still use."""
        return sum(usage.reserved for usage in self._live_usages(tenant))

    def _live_usages(self, tenant: str) -> Iterator[TenantUsage]:
        """Yield the tenant's usage at each edge that is alive."""
        if own := self._own.get(tenant):
            yield own.usage(self._minute())
        since = time.monotonic() - LOST_SECONDS
        for heard_at, usage in self._others.values():
            if heard_at > since and tenant in usage.tenants:
                yield usage.tenants[tenant]

    def _estimate(self, request: ChatRequest) -> Need:
        """
        Return the tokens that a request may need, together at most the context window. The session
        of a prompt is not counted: only the worker knows it.
        """
        prompt = prompts.size_bytes(request) // BYTES_PER_TOKEN
        if isinstance(request.text, tuple):
            prompt = len(request.text)
        limits = request.max_completion_tokens, request.max_tokens
        answer = next((limit for limit in limits if limit is not None), DEFAULT_ANSWER_TOKENS)
        if info := self._workers.find_model(request.model):
            prompt = min(prompt, info.context)
            answer = min(answer, info.context - prompt)
        return Need(prompt, answer)

    def _counts(self, tenant: str) -> TenantCounts:
        return self._own.setdefault(tenant, TenantCounts())

    def _minute(self) -> int:
        return int(self._clock() // MINUTE)

    # --- sharing ---

    def _publish_soon(self) -> None:
        if self._loop:
            self._loop.wake()

    async def _share(self) -> float:
        minute = self._minute()
        tenants = {name: counts.usage(minute) for name, counts in self._own.items()}
        if tenants:
            message = EdgeUsage(self._edge_id, minute, tenants)
            await self._bus.publish(subjects.usage(self._edge_id), message)
        self._forget(minute)
        await asyncio.sleep(MIN_REPORT_SECONDS)
        return REPORT_SECONDS

    def _forget(self, minute: int) -> None:
        """Forget tenants whose zeros were published, and edges that are gone."""
        idle = TenantUsage(0, (0, 0), (0, 0))
        for name in [name for name, own in self._own.items() if own.usage(minute) == idle]:
            del self._own[name]
        since = time.monotonic() - 3 * MINUTE
        gone = [edge for edge, (heard_at, _) in self._others.items() if heard_at < since]
        for edge in gone:
            del self._others[edge]

    def _on_usage(self, delivery: Delivery) -> None:
        usage = decode(delivery.data, EdgeUsage)
        if usage.edge_id == self._edge_id:
            return
        if abs(usage.minute - self._minute()) > 1:  # its clock is wrong: go by the arrival
            usage = replace(usage, minute=self._minute())
        self._others[usage.edge_id] = time.monotonic(), usage


def _limits_per_minute(key: ApiKey) -> Iterator[tuple[Kind, int]]:
    if key.requests_per_minute is not None:
        yield "requests", key.requests_per_minute
    if key.tokens_per_minute is not None:
        yield "tokens", key.tokens_per_minute


class CountedAnswer(AnswerObserver):
    """Counts one reading of an answer, and its tokens as they come."""

    def __init__(
        self,
        limits: RateLimits,
        counts: TenantCounts,
        tenant: str,
        request: ChatRequest | None,
        need: Need,
    ) -> None:
        """Without a `request`, a reader returns to an answer whose prompt was counted before."""
        self._limits = limits
        self._tenant = tenant
        self._is_new = request is not None
        self._continues = request is not None and request.grace_s > 0  # without a reader
        self._need = need
        self._reserved = Reservation(counts, need.total)
        self._counted = 0
        self._has_ended = False

    def on_event(self, event: StreamEvent) -> None:
        match event:
            case Token() | ToolCallDelta():
                tokens = len(event.token_ids)
                self._reserved.release(tokens)
                self._count(tokens)
            case Started() if self._is_new and not self._counted:  # a failover starts again
                self._reserved.release(self._need.prompt)
                self._count(event.prompt_tokens)
            case Done(usage=usage):
                self._has_ended = True
                if self._is_new:
                    used = usage.prompt_tokens + usage.completion_tokens
                    self._count(max(0, used - self._counted))
            case Failed():
                self._has_ended = True

    def close(self) -> None:
        unused = self._reserved.tokens
        self._reserved.release(unused)
        if self._continues and not self._has_ended:
            self._count(unused)  # nobody sees how many the answer uses without a reader
        self._limits.end(self._tenant)

    def _count(self, tokens: int) -> None:
        self._counted += tokens
        self._limits.count_tokens(self._tenant, tokens)
