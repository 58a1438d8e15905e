"""Settings of `just cluster`. docs/settings.md is generated from them."""

from typing import Annotated

from msgspec import Meta

from services.runtime.settings import Port, ServiceSettings


class ClusterSettings(ServiceSettings, frozen=True, kw_only=True):
    cluster_mongodb_port: Annotated[
        Port,
        Meta(
            description="First port of `just cluster` for its three MongoDB servers. Its three NATS"
            " servers have `NATS_PORT` and the five ports after it, its two edges `EDGE_PORT` and"
            " the next one."
        ),
    ] = 27117
