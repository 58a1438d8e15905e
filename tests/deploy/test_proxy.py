"""Errors of the proxy of docker-compose.yml have the form of the edge's; checked without Docker."""

import json
import re
from typing import Any

import pytest

from services.contract.errors import ServiceError
from services.edge.errors import body
from tests.servers import ROOT

ERROR = re.compile(r"^ +http-error status (\d+) content-type application/json .*'(.*)'$", re.M)


def proxy_errors() -> dict[int, dict[str, Any]]:
    """Return the bodies of haproxy.cfg by status."""
    text = (ROOT / "deploy/compose/haproxy.cfg").read_text()
    return {int(status): json.loads(found) for status, found in ERROR.findall(text)}


@pytest.mark.parametrize("status", [502, 503, 504])
def test_error_of_the_proxy_has_the_form_of_the_edges(status: int) -> None:
    error = proxy_errors()[status]["error"]
    own = body(ServiceError("no_worker", "No worker."))["error"]
    assert error.keys() == own.keys()
    assert error["type"] == "server_error"
