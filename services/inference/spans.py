"""The spans of a chat request in a worker, from the times that its stages have noted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.client import spans
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.in_flight import InFlightRequest
from services.runtime import tracing


@contextmanager
def serving(flight: InFlightRequest) -> Iterator[None]:
    """
    Work on the span of the request during the body. Its children `queue`, `prefill` and `decode`
    are added at the end, so that they cost nothing while it runs.
    """
    span = spans.start_chat(
        flight.request,
        "server",
        at=flight.received_at,
        worker_id=flight.worker_id,
        resumed=flight.request.resume is not None,
    )
    try:
        with span.active():
            yield
            if span.is_recorded and flight.sequence:
                _record_stages(flight, flight.sequence)
    finally:
        if span.is_recorded:
            span.set({"gen_ai.response.model": flight.variant.info.name})
        spans.end_chat(span, flight.last or "cancelled")


def _record_stages(flight: InFlightRequest, sequence: Sequence) -> None:
    """Record the stages that the sequence reached. A stage in which it ended, ends with it."""
    usage, ended = sequence.usage, flight.computed_at or time.monotonic()
    started, first = sequence.started_at, sequence.first_token_at
    tracing.record("queue", flight.submitted_at, started or ended)
    if started:
        tokens = {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        }
        tracing.record("prefill", started, first or ended, tokens)
    if first:
        tokens = {"gen_ai.usage.output_tokens": usage.completion_tokens}
        tracing.record("decode", first, sequence.last_token_at, tokens)
