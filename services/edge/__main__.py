"""`python -m services.edge`: the HTTP server in front of NATS."""

import asyncio
import ipaddress
import logging
import socket
from dataclasses import replace

from services.edge.api.agents import serving_agents
from services.edge.app import make_app, make_edge, make_metrics_app
from services.edge.context import Edge
from services.edge.keys import ApiKeys
from services.edge.limits import EdgeLimits
from services.edge.server import bind, serving
from services.edge.settings import EdgeSettings
from services.runtime.bus import Bus
from services.runtime.process import Process, run

log = logging.getLogger(__name__)


async def serve(process: Process, settings: EdgeSettings) -> None:
    listener = process.stack.enter_context(bind(settings.edge_host, settings.edge_port))
    if not settings.edge_api_keys:
        _warn_if_exposed(listener)
    bus = await process.stack.enter_async_context(Bus.connect(settings.nats_url, "edge"))
    draining = asyncio.Event()
    limits = EdgeLimits(max_payload_bytes=bus.max_payload)
    edge = await make_edge(
        bus,
        draining,
        limits,
        settings.edge_strict,
        settings.edge_any_model,
        settings.edge_metrics_tenants,
    )
    if settings.edge_metrics_port:
        await _serve_metrics(process, edge, settings.edge_host, settings.edge_metrics_port)
    keys = ApiKeys.parse(settings.edge_api_keys)
    app = make_app(
        edge,
        keys,
        settings.edge_cors_origins,
        settings.edge_allowed_hosts,
        has_metrics=settings.edge_metrics_port is None,
    )
    server = serving(app, listener, draining, process.fail, limits)
    await process.stack.enter_async_context(server)
    await process.stack.enter_async_context(serving_agents(edge, keys.tenants, process.fail))


async def _serve_metrics(process: Process, edge: Edge, host: str, port: int) -> None:
    """Serve metrics on a port of their own. They end last, so that they show the draining."""
    listener = process.stack.enter_context(bind(host, port, "EDGE_METRICS_PORT"))
    limits = replace(edge.limits, handover_seconds=0)
    server = serving(make_metrics_app(edge), listener, asyncio.Event(), process.fail, limits)
    await process.stack.enter_async_context(server)


def _warn_if_exposed(listener: socket.socket) -> None:
    address = listener.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        log.warning(
            "listening without API keys address=%s: any client can read and erase every session."
            " Set EDGE_API_KEYS, or EDGE_HOST=127.0.0.1.",
            address,
        )


if __name__ == "__main__":
    run("edge", EdgeSettings, serve)
