"""What the edge is told by its environment."""

from typing import Annotated

from msgspec import Meta

from services.edge.keys import Keys
from services.runtime.settings import ServiceSettings


class EdgeSettings(ServiceSettings, frozen=True, kw_only=True):
    edge_host: str = "127.0.0.1"  # 0.0.0.0: all interfaces
    edge_port: Annotated[int, Meta(ge=1, le=65535)] = 8002
    edge_api_keys: str = ""  # name:key,name:key; see keys.py
    # of the browser pages that may ask; `*` stands for anything
    edge_cors_origins: tuple[str, ...] = (
        "http://localhost",
        "http://localhost:*",
        "http://127.0.0.1",
        "http://127.0.0.1:*",
    )
    edge_strict: bool = False  # unknown fields of /v1 are an error

    def __post_init__(self) -> None:
        super().__post_init__()
        Keys.parse(self.edge_api_keys)  # raises BadSetting
