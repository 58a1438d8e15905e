"""
Metrics in Prometheus' text format: what this edge counts and measures, and the fleet's state from
the reports of workers and history.

Figures have the names of vLLM (https://docs.vllm.ai/en/latest/usage/metrics) and llama-server
(https://github.com/ggml-org/llama.cpp/tree/master/tools/server) where the meaning is the same, so
that their dashboards work; others begin with `finetunellm_`. docs/operations.md lists them all.

Labels have few values: models by the names that workers report, APIs by module, codes, and tenants
only if a setting asks for them.
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from services.client.observer import AnswerObserver
from services.client.routing import WorkerDirectory
from services.contract.errors import ErrorCode
from services.contract.history import Feedback, HistoryStatus
from services.contract.messages import (
    AnswerEvent,
    ChatRequest,
    Done,
    Failed,
    FinishReason,
    StreamEvent,
)
from services.edge.activity import ActivityMonitor
from services.edge.event_histogram import EventHistogram
from services.runtime.bus import Bus
from services.runtime.metrics import (
    StateCollector,
    history_families,
    process_families,
    worker_families,
)

MEDIA_TYPE = "text/plain; version=0.0.4"  # Litestar adds the charset
UNKNOWN_MODEL = "unknown"
"""Label of requests for a model that no worker has: its name is the caller's, so unbounded."""
VLLM_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
    "loop": "repetition",
    "cancelled": "abort",
    "timeout": "abort",
    "failed": "error",
}

# The buckets of vLLM, in seconds or tokens
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80, 160, 640, 2560),
)
TOKEN_SECONDS_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40),
    80,
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920),
    7680,
)
TOKENS_BUCKETS = tuple(n * 10**power for power in range(6) for n in (1, 2, 5))

# the times of creation would double the series of counters
disable_created_metrics()  # type: ignore[no-untyped-call]


class EdgeMetrics:
    """The metrics of one edge, in a registry of their own."""

    def __init__(
        self,
        bus: Bus,
        workers: WorkerDirectory,
        activity: ActivityMonitor,
        by_tenant: bool = False,
    ) -> None:
        """`by_tenant`: count answers and tokens by tenant too."""
        self._bus = bus
        self._workers = workers
        self._activity = activity
        self._registry = CollectorRegistry()
        self._answers = AnswerMetrics(self._registry)
        self._tenants = TenantMetrics(self._registry) if by_tenant else None
        self._http_requests = Counter(
            "finetunellm_http_requests",
            "HTTP requests by API and status; 0: the client disconnected before the response.",
            ("api", "status"),
            registry=self._registry,
        )
        self._error_responses = Counter(
            "finetunellm_error_responses",
            "HTTP responses with an error, such as refused requests.",
            ("api", "code"),
            registry=self._registry,
        )
        self._repeats = Counter(
            "finetunellm_idempotent_repeats",
            "Requests of /chat that got an earlier answer by their Idempotency-Key.",
            registry=self._registry,
        )
        self._resumes = Counter(
            "finetunellm_resumes",
            "Readers that returned to an existing answer.",
            registry=self._registry,
        )
        self._feedback = Counter(
            "finetunellm_feedback",
            "Feedback on answers: `up`, `down`, `corrected`, `preferred`.",
            ("model_name", "kind"),
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def observe(self, tenant: str, request: ChatRequest | None) -> AnswerObserver:
        """Begin to measure an answer (Observe). One that is rejoined was counted before."""
        if request is None:
            self._resumes.inc()
            return RejoinObserver(self._answers)
        count_tenant = self._tenants.counting(tenant) if self._tenants else _count_no_tenant
        model = self._model_name(request.model)

        def on_failure(code: ErrorCode) -> None:
            self._activity.on_failed_answer(code, model, tenant, str(request.request_id))

        on_first_token = self._activity.on_first_token
        return MeasuredAnswer(self._answers, model, count_tenant, on_first_token, on_failure)

    def on_http_request(self, api: str, status: int, code: ErrorCode | None) -> None:
        self._http_requests.labels(api, status).inc()
        if code:
            self._error_responses.labels(api, code).inc()

    def on_repeat(self) -> None:
        """Count a request that got an earlier answer by its Idempotency-Key."""
        self._repeats.inc()

    def on_feedback(self, model: str, given: Feedback) -> None:
        """Count new feedback on an answer of this model, whose name an import may have invented."""
        name = model if model in self._workers.model_names() else UNKNOWN_MODEL
        kinds = {"corrected": given.correction, "preferred": given.preferred_to}
        for kind in (given.rating, *(kind for kind, value in kinds.items() if value)):
            if kind:
                self._feedback.labels(name, kind).inc()

    def render(self, history: HistoryStatus | None) -> bytes:
        """Return all metrics, with the status of history; None: it does not reply."""
        process = process_families(self._bus)
        fleet = worker_families(self._workers.reports())
        stored = history_families(history)
        everything = chain(self._registry.collect(), process, fleet, stored)
        return generate_latest(StateCollector(lambda: everything))

    def _model_name(self, name: str | None) -> str:
        if name in self._workers.model_names():
            return str(name)
        model = self._workers.find_model(name)
        return model.name if model else UNKNOWN_MODEL


# --- answers --------------------------------------------------------------------------------------


class AnswerMetrics:
    """Metrics of answers by model. Durations are of this process's clock, or of the worker's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, ("model_name", *labels), registry=registry)

        def histogram(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, about, ("model_name",), registry=registry, buckets=buckets)

        self.open_streams = Gauge(
            "finetunellm_open_answers",
            "Answers that this edge reads now.",
            ("model_name",),
            registry=registry,
        )
        self.answers = counter(
            "finetunellm_answers",
            "Answers by finish reason; `disconnected`: the client left before the end.",
            "finish_reason",
        )
        self.failed = counter("finetunellm_failed_answers", "Answers that failed.", "code")
        self.failovers = Counter(
            "finetunellm_failovers",
            "Lost workers whose answer another worker had to resume.",
            registry=registry,
        )
        self.replays = Counter(
            "finetunellm_replays",
            "Replays that workers sent after a gap or a silence.",
            registry=registry,
        )
        self.success = counter("vllm:request_success", "Ended requests.", "finished_reason")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens, with cached ones.")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self.prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self.prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens that the prefix cache had."
        )
        self.drafted_tokens = counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens that were drafted and verified."
        )
        self.accepted_tokens = counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that are in the answer."
        )
        self.prefilled_tokens = counter(
            "llamacpp:prompt_tokens", "Prompt tokens that were computed."
        )
        self.prefill_total = counter("llamacpp:prompt_seconds", "Seconds of prefill.")
        self.predicted_tokens = counter("llamacpp:tokens_predicted", "Generated tokens.")
        self.decode_total = counter("llamacpp:tokens_predicted_seconds", "Seconds of decode.")
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first text.", TTFT_BUCKETS
        )
        self.inter_token = EventHistogram(
            "vllm:inter_token_latency_seconds",
            "Between two events of an answer, divided by the tokens of the second.",
            TOKEN_SECONDS_BUCKETS,
            registry,
        )
        self.e2e = histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its end.", REQUEST_BUCKETS
        )
        self.queued = histogram(
            "vllm:request_queue_time_seconds", "At the worker, before a slot.", REQUEST_BUCKETS
        )
        self.prefill = histogram(
            "vllm:request_prefill_time_seconds", "From the slot to a token.", REQUEST_BUCKETS
        )
        self.decode = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST_BUCKETS
        )
        self.prompt_length = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS_BUCKETS
        )
        self.answer_length = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS_BUCKETS
        )


class TenantMetrics:
    """Answers and tokens by tenant, which are as many as there are names of API keys."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter(
            "finetunellm_tenant_answers", "Ended answers.", ("tenant",), registry=registry
        )
        self._tokens = Counter(
            "finetunellm_tenant_tokens",
            "Tokens of ended answers: `prompt` with cached ones, `generated`.",
            ("tenant", "kind"),
            registry=registry,
        )

    def counting(self, tenant: str) -> "CountTenant":
        def count(prompt_tokens: int, generated_tokens: int) -> None:
            self._answers.labels(tenant).inc()
            self._tokens.labels(tenant, "prompt").inc(prompt_tokens)
            self._tokens.labels(tenant, "generated").inc(generated_tokens)

        return count


CountTenant = Callable[[int, int], None]
"""Takes the prompt tokens and the generated tokens of an ended answer."""


def _count_no_tenant(prompt_tokens: int, generated_tokens: int) -> None:
    pass


class RejoinObserver(AnswerObserver):
    """Counts only what happens to this reader."""

    __slots__ = ("_metrics",)

    def __init__(self, metrics: AnswerMetrics) -> None:
        self._metrics = metrics

    def on_failover(self) -> None:
        self._metrics.failovers.inc()

    def on_replay(self) -> None:
        self._metrics.replays.inc()


class MeasuredAnswer(RejoinObserver):
    """
    Measures one answer. An event costs about a microsecond, an answer about sixty
    (docs/decisions/0084).
    """

    __slots__ = (
        "_model",
        "_count_tenant",
        "_on_first_token",
        "_on_failure",
        "_inter_token",
        "_started_at",
        "_last_at",
        "_has_text",
        "_has_ended",
        "_tokens",
    )

    def __init__(
        self,
        metrics: AnswerMetrics,
        model: str,
        count_tenant: CountTenant,
        on_first_token: Callable[[float], None],
        on_failure: Callable[[ErrorCode], None],
    ) -> None:
        """`on_first_token` takes the seconds until then."""
        super().__init__(metrics)
        self._model = model
        self._count_tenant = count_tenant
        self._on_first_token = on_first_token
        self._on_failure = on_failure
        self._inter_token = metrics.inter_token.of_model(model)
        self._started_at = self._last_at = time.monotonic()
        self._has_text = self._has_ended = False
        self._tokens = 0  # received
        metrics.open_streams.labels(model).inc()

    def on_event(self, event: StreamEvent) -> None:
        if isinstance(event, AnswerEvent):
            self._on_text(len(event.token_ids))
        elif isinstance(event, Done):
            self._on_done(event)
        elif isinstance(event, Failed):
            self._on_failed(event)

    def close(self) -> None:
        metrics, model = self._metrics, self._model
        metrics.open_streams.labels(model).dec()
        if not self._has_ended:
            metrics.answers.labels(model, "disconnected").inc()
            self._end("abort", 0, self._tokens)

    def _on_text(self, tokens: int) -> None:
        now = time.monotonic()
        if not self._has_text:
            self._has_text = True
            self._metrics.ttft.labels(self._model).observe(now - self._started_at)
            self._on_first_token(now - self._started_at)
        elif tokens:
            self._inter_token.observe((now - self._last_at) / tokens)
        self._tokens += tokens
        self._last_at = now

    def _on_done(self, done: Done) -> None:
        metrics, model, usage = self._metrics, self._model, done.usage
        timings, computed = done.timings, usage.prompt_tokens - usage.cached_tokens
        metrics.answers.labels(model, done.finish_reason).inc()
        metrics.e2e.labels(model).observe(time.monotonic() - self._started_at)
        metrics.queued.labels(model).observe(timings.queued)
        metrics.prefill.labels(model).observe(timings.prefill)
        metrics.decode.labels(model).observe(timings.decode)
        metrics.prompt_length.labels(model).observe(usage.prompt_tokens)
        metrics.answer_length.labels(model).observe(usage.completion_tokens)
        metrics.prefix_queries.labels(model).inc(usage.prompt_tokens)
        metrics.prefix_hits.labels(model).inc(usage.cached_tokens)
        metrics.drafted_tokens.labels(model).inc(usage.drafted_tokens)
        metrics.accepted_tokens.labels(model).inc(usage.accepted_tokens)
        metrics.prefilled_tokens.labels(model).inc(max(0, computed))
        metrics.prefill_total.labels(model).inc(max(0.0, timings.prefill))
        metrics.decode_total.labels(model).inc(max(0.0, timings.decode))
        self._end(VLLM_REASONS[done.finish_reason], usage.prompt_tokens, usage.completion_tokens)

    def _on_failed(self, failed: Failed) -> None:
        self._metrics.failed.labels(self._model, failed.code).inc()
        self._on_failure(failed.code)
        self._end("error", 0, self._tokens)

    def _end(self, reason: str, prompt_tokens: int, generated_tokens: int) -> None:
        metrics, model = self._metrics, self._model
        self._has_ended = True
        metrics.success.labels(model, reason).inc()
        metrics.prompt_tokens.labels(model).inc(prompt_tokens)
        metrics.generation_tokens.labels(model).inc(generated_tokens)
        metrics.predicted_tokens.labels(model).inc(generated_tokens)
        self._count_tenant(prompt_tokens, generated_tokens)
