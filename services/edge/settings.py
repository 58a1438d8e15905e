"""Settings of the edge. docs/settings.md is generated from them."""

from typing import Annotated

from msgspec import Meta

from services.edge.keys import parse_setting
from services.runtime.settings import InvalidSetting, Port, ServiceSettings


class EdgeSettings(ServiceSettings, frozen=True, kw_only=True):
    edge_host: Annotated[
        str,
        Meta(
            description="Address to listen on. With `0.0.0.0` other machines can connect: set"
            " `EDGE_API_KEYS` too."
        ),
    ] = "127.0.0.1"
    edge_port: Annotated[Port, Meta(description="Port to listen on.")] = 8002
    edge_api_keys: Annotated[
        str,
        Meta(
            description="API keys as `name:key,name:key`. Each name is a tenant with its own"
            " sessions. `just keys` makes keys that can be limited and revoked."
        ),
    ] = ""
    edge_keys_file: Annotated[
        str,
        Meta(
            description="JSON file with keys, as `just keys add NAME --file FILE` writes it. It is"
            " read again when it changes."
        ),
    ] = ""
    edge_metrics_port: Annotated[
        Port | None,
        Meta(
            description="Port of its own for `GET /metrics`, without API keys: for a network that"
            " only Prometheus reaches. Empty: `/metrics` is on `EDGE_PORT`, and needs a key if"
            " there are any."
        ),
    ] = None
    edge_metrics_tenants: Annotated[
        bool,
        Meta(
            description="`true`: `/metrics` counts answers and tokens by tenant too, under the"
            " names in `EDGE_API_KEYS`."
        ),
    ] = False
    edge_cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="Origins whose web pages may call the API. `*` stands for any text within"
            " an origin."
        ),
    ] = ("http://localhost", "http://localhost:*", "http://127.0.0.1", "http://127.0.0.1:*")
    edge_allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="Names in the `Host` header that are served, beside addresses and names"
            " without a dot; `*` stands for any text. Others are a 421. Empty: with API keys all"
            " names, without them no others, so that no web page can reach the server under its own"
            " name (DNS rebinding)."
        ),
    ] = ()
    edge_page: Annotated[
        bool,
        Meta(
            description="`true`: browsers get the chat page at `/`. `false`: a welcome with links."
        ),
    ] = True
    edge_any_model: Annotated[
        bool,
        Meta(
            description="`true`: while one model is served, an unknown model name in `/v1` stands"
            " for it. `false`: that is a 404."
        ),
    ] = False
    edge_strict: Annotated[
        bool,
        Meta(
            description="`true` rejects unknown fields in `/v1` bodies. `false` ignores them and"
            " lists them in the header `X-Ignored-Fields`."
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_setting(self.edge_api_keys)  # raises InvalidSetting
        if self.edge_metrics_port == self.edge_port:
            raise InvalidSetting(
                f"EDGE_METRICS_PORT is {self.edge_port}, like EDGE_PORT: choose another port, or"
                " leave it empty to have /metrics on EDGE_PORT."
            )
