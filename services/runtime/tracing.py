"""
Spans of OpenTelemetry, exported by OTLP over HTTP if OTEL_EXPORTER_OTLP_ENDPOINT is set.

    with tracing.span("context", "client") as span:
        ...                                   # requests of the body continue the trace
        span.set({"finetunellm.tries": 2})

Without the setting nothing of OpenTelemetry is imported: a span is then only the context of its
trace, which goes on unchanged. Prompts and answers never become attributes.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from services.contract.errors import ErrorCode
from services.contract.version import VERSION
from services.runtime.settings import InvalidSetting
from services.runtime.trace_context import TraceContext, current, working_on

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

Kind = Literal["server", "client", "internal"]
Attributes = Mapping[str, str | bool | int | float | Sequence[str] | None]
"""By name; those that are None are left out."""

NAMESPACE = "finetunellm"
SIGNAL_PATH = "/v1/traces"  # of OTLP over HTTP
FLUSH_SECONDS = 3.0
NOT_INSTALLED = (
    "OTEL_EXPORTER_OTLP_ENDPOINT can't be used: OpenTelemetry is not installed. Run `pip"
    " install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http`, or unset the variable."
)
NO_URL = (  # which may hold a password, so it is not quoted
    "OTEL_EXPORTER_OTLP_ENDPOINT can't be used: it must be a URL such as http://localhost:4318."
)
NOT_FOUND: ErrorCode = "not_found"  # a reply like others: history is asked for new ids
NO_ATTRIBUTES: Attributes = {}

log = logging.getLogger(__name__)


class Span:
    """An operation of a trace: call `end` once. `context` is for what it causes elsewhere."""

    __slots__ = ("_recorded", "context")

    def __init__(self, context: TraceContext, recorded: Any = None) -> None:
        self.context = context
        self._recorded = recorded

    @property
    def is_recorded(self) -> bool:
        """Whether attributes have an effect: else they needn't be collected."""
        return self._recorded is not None

    def set(self, attributes: Attributes) -> None:
        if self._recorded is not None:
            self._recorded.set_attributes(_present(attributes))

    def rename(self, name: str) -> None:
        if self._recorded is not None:
            self._recorded.update_name(name)

    def active(self) -> AbstractContextManager[None]:
        """Work on this span during the body: others that it starts are its children."""
        return working_on(self.context)

    def end(self, error: str = "", at: float | None = None) -> None:
        """End it now or `at` a monotonic time. `error`: why it failed, as a code."""
        if self._recorded is None:
            return
        if error:
            _mark_failed(self._recorded, error)
        self._recorded.end(_nanoseconds(at))


def start(
    name: str,
    kind: Kind = "internal",
    attributes: Attributes = NO_ATTRIBUTES,
    at: float | None = None,
) -> Span:
    """
    Return a new child of the current span, or the first span of a new trace. It begins now, or `at`
    a monotonic time.
    """
    parent = current.get()
    if _recorder is None:
        return Span(parent or TraceContext.new())
    return _recorder.start(name, kind, parent, attributes, at)


@contextmanager
def span(
    name: str, kind: Kind = "internal", attributes: Attributes = NO_ATTRIBUTES
) -> Iterator[Span]:
    """Work on a new span during the body. An exception is its error, unless it is `not_found`."""
    started = start(name, kind, attributes)
    error = "cancelled"  # unless the body ends otherwise
    try:
        with started.active():
            yield started
        error = ""
    except Exception as failure:
        code = str(getattr(failure, "code", type(failure).__name__))
        error = "" if code == NOT_FOUND else code
        raise
    finally:
        started.end(error)


def record(name: str, began: float, ended: float, attributes: Attributes = NO_ATTRIBUTES) -> None:
    """Add a child of the current span that is over, with its monotonic times."""
    if _recorder is not None:
        start(name, attributes=attributes, at=began).end(at=ended)


@asynccontextmanager
async def exporting(
    endpoint: str, service: str, flush_seconds: float = FLUSH_SECONDS
) -> AsyncIterator[None]:
    """
    Export the spans of this process during the body, and its last ones in the `flush_seconds` after
    it; do nothing if `endpoint` is empty. Raises InvalidSetting if it is no URL, or if
    OpenTelemetry is not installed or can't use another OTEL_… variable.
    """
    global _recorder
    if not endpoint:
        yield
        return
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidSetting(NO_URL)
    try:
        _recorder = _Recorder(endpoint, service)
    except ImportError as error:
        raise InvalidSetting(NOT_INSTALLED) from error
    except ValueError as error:
        raise InvalidSetting(f"OpenTelemetry can't use an OTEL_… variable: {error}.") from error
    try:
        yield
    finally:
        closing, _recorder = _recorder, None
        await closing.close(flush_seconds)


class _Recorder:
    """
    The SDK's tracer. Spans are queued; a thread of the SDK exports them in batches, and drops those
    that are too many. The SDK reads the other OTEL_… variables, such as that of the sampler, which
    by default keeps what the caller decided.
    """

    def __init__(self, endpoint: str, service: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        own = {
            "service.name": service,
            "service.namespace": NAMESPACE,
            "service.version": VERSION,
        }
        resource = Resource.create(own | dict(OTELResourceDetector().detect().attributes))
        self._exporter = _reporting(OTLPSpanExporter(endpoint.rstrip("/") + SIGNAL_PATH), endpoint)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(NAMESPACE, VERSION)
        self._trace = trace

    def start(
        self,
        name: str,
        kind: Kind,
        parent: TraceContext | None,
        attributes: Attributes,
        at: float | None,
    ) -> Span:
        trace = self._trace
        recorded = self._tracer.start_span(
            name,
            self._within(parent) if parent else trace.set_span_in_context(trace.INVALID_SPAN),
            trace.SpanKind[kind.upper()],
            _present(attributes),
            start_time=_nanoseconds(at),
        )
        made = recorded.get_span_context()
        if not made.is_valid:  # OTEL_SDK_DISABLED
            return Span(parent or TraceContext.new())
        context = TraceContext(
            trace.format_trace_id(made.trace_id),
            trace.format_span_id(made.span_id),
            made.trace_flags.sampled,
            parent.state if parent else "",
        )
        return Span(context, recorded if recorded.is_recording() else None)

    def _within(self, parent: TraceContext) -> Any:
        trace = self._trace
        flags = trace.TraceFlags.SAMPLED if parent.is_sampled else trace.TraceFlags.DEFAULT
        context = trace.SpanContext(
            int(parent.trace_id, 16),
            int(parent.span_id, 16),
            is_remote=True,
            trace_flags=trace.TraceFlags(flags),
            trace_state=trace.TraceState.from_header([parent.state]) if parent.state else None,
        )
        return trace.set_span_in_context(trace.NonRecordingSpan(context))

    async def close(self, seconds: float) -> None:
        """Export what is queued, for at most some `seconds`: the collector may be away."""
        closed, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed: it was too late
                loop.call_soon_threadsafe(closed.set)

        # the thread is a daemon, so that the process can end before it
        threading.Thread(target=shut_down, name="span export", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                await closed.wait()
        except TimeoutError:
            log.warning("the last spans were not exported")


_recorder: _Recorder | None = None


def _reporting(exporter: "SpanExporter", endpoint: str) -> "SpanExporter":
    """
    Return the exporter with one log line when the collector stops taking spans, and one when it
    takes them again. The SDK would log every try and every dropped span.
    """
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    user, _, address = endpoint.partition("://")[2].partition("/")[0].rpartition("@")
    reason = _FirstMessage()
    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [reason], False

    class Reporting(SpanExporter):
        is_failing = False

        def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
            reason.text = ""
            result = exporter.export(spans)
            self._report(result is not SpanExportResult.SUCCESS)
            return result

        def _report(self, has_failed: bool) -> None:
            if has_failed and not self.is_failing:
                text = reason.text.replace(f"{user}@", "") if user else reason.text
                log.warning("spans are dropped endpoint=%s error=%.500r", address, text)
            elif self.is_failing and not has_failed:
                log.info("spans are exported again endpoint=%s", address)
            self.is_failing = has_failed

        def shutdown(self) -> None:
            exporter.shutdown()

    return Reporting()


class _FirstMessage(logging.Handler):
    """Keeps the first message: the SDK's last one on a failure only says that it gives up."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


def _mark_failed(recorded: Any, error: str) -> None:
    from opentelemetry.trace import StatusCode

    recorded.set_attribute("error.type", error)
    recorded.set_status(StatusCode.ERROR)


def _present(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(at: float | None) -> int | None:
    """Return the Unix time of a monotonic time, in nanoseconds."""
    return None if at is None else time.time_ns() - int((time.monotonic() - at) * 1e9)
