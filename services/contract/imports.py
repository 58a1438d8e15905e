"""Validation of imported exchanges beyond their types, shared by the edge and history."""

from datetime import UTC, datetime

from msgspec.structs import asdict

from services.contract.errors import ServiceError
from services.contract.history import Feedback, Imported

COUNTS = range(2**63)


def check(imported: Imported) -> None:
    """
    Raise ServiceError(invalid_request) if the prompt is missing, if a time or a count is out of
    range, or if an answer that calls tools is corrected.
    """
    if not imported.prompt and not imported.tool_results and imported.turn is None:
        raise _invalid("prompt", "a text")
    feedback = imported.feedback or Feedback()
    if feedback.correction is not None and imported.tool_calls:
        raise _invalid("feedback.correction", "no correction of an answer that calls tools")
    for name, time in (
        ("asked_at", imported.asked_at),
        ("answered_at", imported.answered_at),
        ("feedback.given_at", feedback.given_at),
    ):
        if time is not None and not is_in_utc(time):
            raise _invalid(name, "a time within the years 1 to 9999 in UTC")
    counts = [("usage", *each) for each in asdict(imported.usage).items()]
    if imported.model:
        counts += [("model", *each) for each in asdict(imported.model).items()]
    for part, name, count in counts:
        if isinstance(count, int) and count not in COUNTS:
            raise _invalid(f"{part}.{name}", f"a count from 0 to {COUNTS[-1]}")


def is_in_utc(time: datetime) -> bool:
    """Return whether the time is within the years 1 to 9999 in UTC."""
    try:
        time.astimezone(UTC)
    except OverflowError:
        return False
    return True


def _invalid(name: str, expected: str) -> ServiceError:
    """Return an error with the wording of the codec, which names the field."""
    return ServiceError("invalid_request", f"Expected {expected} - at `$.{name}`.")
