"""`/sessions/{session_id}/messages/{message_id}/feedback`: rate, correct and prefer answers."""

from litestar import delete, put
from litestar.params import FromPath
from msgspec import Struct

from services.client.chat_client import new_request_id
from services.contract import subjects
from services.contract.history import (
    Correction,
    Feedback,
    FeedbackRequest,
    FeedbackStored,
    Rating,
    Reason,
)
from services.contract.messages import RequestId
from services.edge.api.sessions import Success
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import SessionQuery, decode_body, read_path

EXAMPLE = (
    'Send JSON like {"rating": "down", "correction": "Rome"}; the fields are rating, reason,'
    " correction and preferred_to"
)
PATH = "/sessions/{session_id:str}/messages/{message_id:str}/feedback"


class FeedbackBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `PUT …/feedback`; a missing field and null remove what was given before."""

    rating: Rating | None = None
    reason: Reason | None = None
    correction: Correction | None = None
    preferred_to: RequestId | None = None


@put(PATH)
async def give_feedback(
    request: AnyRequest,
    session_id: FromPath[str],
    message_id: FromPath[str],
    edge: TheEdge,
    tenant: Tenant,
) -> Feedback:
    """Replace all feedback on an answer; by none, if the body has none."""
    body = decode_body(await request.body(), FeedbackBody, EXAMPLE)
    given = Feedback(body.rating, body.reason, body.correction, body.preferred_to)
    wanted = None if given == Feedback() else given
    stored = await _store(request, edge, tenant, session_id, message_id, wanted)
    return stored.feedback or Feedback()


@delete(PATH, status_code=200)
async def remove_feedback(
    request: AnyRequest,
    session_id: FromPath[str],
    message_id: FromPath[str],
    edge: TheEdge,
    tenant: Tenant,
) -> Success:
    await _store(request, edge, tenant, session_id, message_id, None)
    return Success(message=f"The answer {message_id!r} has no feedback.")


async def _store(
    request: AnyRequest,
    edge: Edge,
    tenant: str,
    session_id: str,
    message_id: str,
    given: Feedback | None,
) -> FeedbackStored:
    session = read_path(request, SessionQuery, session_id).session_id
    subjects.require_request_id(message_id)
    change = FeedbackRequest(session, message_id, given, new_request_id())
    stored = await edge.history.request("feedback", tenant, change, FeedbackStored)
    if given and stored.is_new:
        edge.metrics.on_feedback(stored.model, given)
    return stored
