"""`/metrics`: figures for Prometheus."""

from litestar import Response

from services.edge.context import Admin, TheEdge
from services.edge.metrics import MEDIA_TYPE
from services.edge.parameters import get


@get("/metrics")
async def metrics(edge: TheEdge, admin: Admin) -> Response[bytes]:
    """Return all metrics, which tell of all tenants. On a port of its own nobody needs a key."""
    history = await edge.history.status(edge.limits.scrape_seconds)
    return Response(edge.metrics.render(history), media_type=MEDIA_TYPE)
