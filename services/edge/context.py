"""The context that all route handlers share, and how Litestar injects it into them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from litestar.di import NamedDependency

from services.client.chat_client import ChatClient
from services.client.embedding_client import EmbeddingClient
from services.client.fleet import ReportReader
from services.client.history_requests import HistoryRequests
from services.client.observer import Observe
from services.client.routing import WorkerDirectory
from services.edge.activity import ActivityMonitor
from services.edge.api.openai_body import BodyReader
from services.edge.background import BackgroundResponses
from services.edge.idempotency import IdempotencyKeys, StoredAnswers
from services.edge.keys import ApiKeys
from services.edge.limits import EdgeLimits
from services.edge.metrics import EdgeMetrics
from services.edge.rate_limits import RateLimits
from services.runtime.bus import Bus


@dataclass(frozen=True)
class Edge:
    """The connections and shared state of this process. `draining` is set at shutdown."""

    bus: Bus
    workers: WorkerDirectory
    reports: ReportReader
    history: HistoryRequests
    keys: IdempotencyKeys
    bodies: BodyReader
    background: BackgroundResponses
    draining: asyncio.Event
    limits: EdgeLimits
    metrics: EdgeMetrics
    activity: ActivityMonitor
    api_keys: ApiKeys
    rate_limits: RateLimits
    observe: Observe

    def chat_client(self, tenant: str) -> ChatClient:
        return ChatClient(self.bus, tenant, self.workers, self.limits.failover, self.observe)

    @contextmanager
    def embedding_client(self, tenant: str, size: int) -> Iterator[EmbeddingClient]:
        """Yield a client for one request with an input of `size` bytes. Raises ServiceError."""
        with self.rate_limits.embedding(tenant, size) as observe:
            yield EmbeddingClient(self.bus, self.workers, tenant, self.limits.embedding, observe)

    def stored_answers(self, tenant: str) -> StoredAnswers:
        client = self.chat_client(tenant)
        return StoredAnswers(tenant, client, self.history, self.keys, self.limits)


TheEdge = NamedDependency[Edge]
Tenant = NamedDependency[str]
"""The tenant of the request's API key. A route with this argument requires a key."""
Admin = NamedDependency[str]
"""
The name of the admin whose key the request has. A route with this argument requires such a key, if
keys are required at all.
"""
