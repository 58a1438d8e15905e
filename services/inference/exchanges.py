"""What is kept of a call once it has ended, however it did. No I/O."""

from datetime import UTC, datetime

from services.contract import subjects
from services.contract.history import Exchange
from services.contract.messages import ModelInfo, ResumeState
from services.inference.calls import InFlightRequest
from services.inference.engine.engine import Finished


def of(
    call: InFlightRequest, origin: ResumeState, finished: Finished, model: ModelInfo
) -> Exchange:
    return Exchange(
        previous=origin.applied_seq,
        request_id=call.request_id,
        attempt=subjects.attempt_of_reply(call.reply),
        retry_of=call.request.retry_of,
        epoch=origin.epoch,
        prompt=call.request.prompt,
        response=call.text,
        asked_at=origin.asked_at,
        answered_at=datetime.now(UTC),
        finish_reason=finished.reason,
        model=model,
        sampling=call.sampling,
        usage=finished.usage,
        timings=finished.timings,
        stop_string=finished.stop_string,
    )


def is_same(call: InFlightRequest, exchange: Exchange) -> bool:
    return (exchange.prompt, exchange.response) == (call.request.prompt, call.text)


def goes_on(call: InFlightRequest, exchange: Exchange) -> bool:
    """Whether it is what the call would have said, further or to another end."""
    is_asked = exchange.prompt == call.request.prompt and exchange.finish_reason != "failed"
    return is_asked and exchange.response.startswith(call.text)


def end(exchange: Exchange) -> Finished:
    return Finished(exchange.finish_reason, exchange.usage, exchange.timings, exchange.stop_string)


def unfinished(call: InFlightRequest) -> Finished:
    """As far as it was when it failed."""
    assert call.sequence is not None
    return Finished("failed", call.sequence.usage, call.sequence.timings)
