import json
from typing import Any

import httpx
import msgspec
import pytest

from services.edge.schema import DESCRIBED
from tests.fakes import HELLO, scripted_worker


@pytest.fixture
async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    got: dict[str, Any] = (await http.get("/schema/openapi.json")).json()
    return got


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post", "patch", "delete", "put")
    }


async def test_every_route_that_reads_a_body_tells_its_schema(document: dict[str, Any]) -> None:
    without = {
        path
        for (method, path), operation in operations(document).items()
        if method in ("POST", "PATCH", "PUT") and "requestBody" not in operation
    }
    assert without == {"/clear-history"}
    assert operations(document).keys() >= DESCRIBED.keys()


async def test_what_is_referred_to_is_there(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names and names <= document["components"]["schemas"].keys()


async def test_every_answer_has_a_schema_or_an_example_and_every_error_too(
    document: dict[str, Any],
) -> None:
    for where, operation in operations(document).items():
        first, *_ = operation["responses"].values()
        assert all(media for media in first["content"].values()), where
        assert operation["responses"]["default"]["content"]["application/json"]["schema"], where


async def test_examples_are_what_they_are_examples_of(
    document: dict[str, Any], http: httpx.AsyncClient, nats_url: str
) -> None:
    for (method, path), described in DESCRIBED.items():
        if described.body:
            msgspec.convert(described.example, described.body)
            body = operations(document)[method, path]["requestBody"]["content"]
            assert body[described.body_media]["example"] == described.example
    async with scripted_worker(nats_url, HELLO):
        for path in ("/chat", "/v1/chat/completions", "/v1/completions"):
            answer = await http.post(path, json=DESCRIBED["POST", path].example)
            assert answer.status_code == 200, path


async def test_a_query_is_told(document: dict[str, Any]) -> None:
    told = {each["name"]: each for each in operations(document)["GET", "/messages"]["parameters"]}
    assert told["limit"]["schema"]["maximum"] == 1000 and told["session_id"]["in"] == "query"


async def test_a_browser_gets_a_page(http: httpx.AsyncClient) -> None:
    page = await http.get("/schema", headers={"Accept": "text/html"})
    assert page.status_code == 200 and "openapi" in page.text
