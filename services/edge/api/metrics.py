"""`/metrics`: figures for Prometheus."""

from litestar import Response

from services.edge.context import Tenant, TheEdge
from services.edge.metrics import MEDIA_TYPE
from services.edge.parameters import get


@get("/metrics")
async def metrics(edge: TheEdge, tenant: Tenant) -> Response[bytes]:
    """Return all metrics. On a port of its own, every request is of the open tenant."""
    history = await edge.history.status(edge.limits.scrape_seconds)
    return Response(edge.metrics.render(history), media_type=MEDIA_TYPE)
