"""The context that all route handlers share, and how Litestar injects it into them."""

import asyncio
from dataclasses import dataclass

from litestar.di import NamedDependency

from services.client.chat_client import ChatClient
from services.client.embedding_client import EmbeddingClient
from services.client.routing import WorkerDirectory
from services.edge.api.openai_body import BodyReader
from services.edge.background import BackgroundResponses
from services.edge.history_requests import HistoryRequests
from services.edge.idempotency import IdempotencyKeys, StoredAnswers
from services.edge.limits import EdgeLimits
from services.edge.metrics import EdgeMetrics
from services.runtime.bus import Bus


@dataclass(frozen=True)
class Edge:
    """The connections and shared state of this process. `draining` is set at shutdown."""

    bus: Bus
    workers: WorkerDirectory
    history: HistoryRequests
    keys: IdempotencyKeys
    bodies: BodyReader
    background: BackgroundResponses
    draining: asyncio.Event
    limits: EdgeLimits
    metrics: EdgeMetrics

    def chat_client(self, tenant: str) -> ChatClient:
        observe = self.metrics.observe
        return ChatClient(self.bus, tenant, self.workers, self.limits.failover, observe)

    def embedding_client(self) -> EmbeddingClient:
        return EmbeddingClient(self.bus, self.workers, self.limits.embedding)

    def stored_answers(self, tenant: str) -> StoredAnswers:
        client = self.chat_client(tenant)
        return StoredAnswers(tenant, client, self.history, self.keys, self.limits)


TheEdge = NamedDependency[Edge]
Tenant = NamedDependency[str]
"""The tenant of the request's API key. A route with this argument requires a key."""
