"""`python -m services.edge`: the HTTP server in front of NATS."""

import asyncio
import gc
import ipaddress
import logging
import socket
from dataclasses import replace
from pathlib import Path

from services.contract.version import COMMAND
from services.edge.api.agents import serving_agents
from services.edge.app import make_app, make_edge, make_metrics_app
from services.edge.context import Edge
from services.edge.key_sources import watching_keys
from services.edge.keys import ApiKeys, guessable_names
from services.edge.limits import EdgeLimits
from services.edge.server import bind, serving
from services.edge.settings import EdgeSettings
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.process import Process, run

GC_THRESHOLDS = 2_000, 10, 20  # new objects, and collections of the generation before

log = logging.getLogger(__name__)


async def serve(process: Process, settings: EdgeSettings) -> None:
    listener = process.stack.enter_context(bind(settings.edge_host, settings.edge_port))
    bus = await process.stack.enter_async_context(
        Bus.connect(settings.nats_url, "edge", NatsAccess.of(settings))
    )
    draining = asyncio.Event()
    limits = EdgeLimits(max_payload_bytes=bus.max_payload)
    keys = ApiKeys.parse(settings.edge_api_keys)
    path = Path(settings.edge_keys_file) if settings.edge_keys_file else None
    await process.stack.enter_async_context(watching_keys(bus, keys, path, process.fail))
    if keys.is_open:
        _warn_if_exposed(listener)
    for name in guessable_names(settings.edge_api_keys):
        log.warning("guessable API key name=%s: use one of `%s keys add`", name, COMMAND)
    edge = await make_edge(
        bus,
        draining,
        limits,
        keys,
        settings.edge_strict,
        settings.edge_any_model,
        settings.edge_metrics_tenants,
    )
    if settings.edge_metrics_port:
        await _serve_metrics(process, edge, settings.edge_host, settings.edge_metrics_port)
    await process.stack.enter_async_context(edge.reports.reading(process.fail))
    await process.stack.enter_async_context(edge.rate_limits.sharing(process.fail))
    await process.stack.enter_async_context(edge.activity.sampling(process.fail))
    app = make_app(
        edge,
        settings.edge_cors_origins,
        settings.edge_allowed_hosts,
        has_metrics=settings.edge_metrics_port is None,
        has_page=settings.edge_page,
    )
    server = serving(app, listener, draining, process.fail, limits)
    await process.stack.enter_async_context(server)
    await process.stack.enter_async_context(serving_agents(edge, process.fail))
    _collect_garbage_rarely()


def _collect_garbage_rarely() -> None:
    """
    Let the collector look at what was made since the start only, and seldom: with thousands of
    streams it would visit all their objects many times a second, and find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


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
            " Make one with `%s keys add NAME`, or set EDGE_HOST=127.0.0.1.",
            address,
            COMMAND,
        )


if __name__ == "__main__":
    run("edge", EdgeSettings, serve)
