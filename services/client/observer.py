"""What a ChatClient reports about the answers that it reads, for metrics."""

from collections.abc import Callable

from services.contract.messages import ChatRequest, StreamEvent


class AnswerObserver:
    """
    Follows one reading of an answer. Methods must be quick and raise nothing; these do nothing.
    """

    def on_event(self, event: StreamEvent) -> None:
        """An event is about to be returned to the reader."""

    def on_failover(self) -> None:
        """The worker is lost, so another one has to resume the answer."""

    def on_replay(self) -> None:
        """The worker has sent events again, after a gap or a silence."""

    def close(self) -> None:
        """The reading has ended, perhaps before the answer."""


Observe = Callable[[str, ChatRequest | None], AnswerObserver]
"""Takes the tenant and the request, or None for a reader that rejoins an existing answer."""


def observe_nothing(tenant: str, request: ChatRequest | None) -> AnswerObserver:
    return AnswerObserver()
