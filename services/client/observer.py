"""What a ChatClient reports about the answers that it reads, for metrics."""

from collections.abc import Callable

from services.contract.messages import ChatRequest, ModelKind, StreamEvent


class AnswerObserver:
    """
    Follows one reading of an answer. Methods must be quick and raise nothing; these do nothing.
    """

    __slots__ = ()

    def on_event(self, event: StreamEvent) -> None:
        """An event is about to be returned to the reader."""

    def on_failover(self) -> None:
        """The worker is lost, so another one has to resume the answer."""

    def on_replay(self) -> None:
        """The worker has sent events again, after a gap or a silence."""

    def close(self) -> None:
        """The reading has ended, perhaps before the answer."""


Observe = Callable[[str, ChatRequest | None], AnswerObserver]
"""
Takes the tenant and the request, or None for a reader that rejoins an existing answer. Raises
ServiceError to refuse the request.
"""
ObserveTokens = Callable[[int], None]
"""Takes the tokens of each part of an embedding or ranking request."""
ObserveEmbedding = Callable[[str | None, ModelKind], ObserveTokens]
"""Takes the model of such a request, and its kind. Raises ServiceError to refuse it."""


class Observers(AnswerObserver):
    """Several observers of one answer."""

    def __init__(self, *observers: AnswerObserver) -> None:
        self._observers = observers

    def on_event(self, event: StreamEvent) -> None:
        for observer in self._observers:
            observer.on_event(event)

    def on_failover(self) -> None:
        for observer in self._observers:
            observer.on_failover()

    def on_replay(self) -> None:
        for observer in self._observers:
            observer.on_replay()

    def close(self) -> None:
        for observer in self._observers:
            observer.close()


def observe_nothing(tenant: str, request: ChatRequest | None) -> AnswerObserver:
    return AnswerObserver()


def observe_no_tokens(model: str | None, kind: ModelKind) -> ObserveTokens:
    return lambda tokens: None
