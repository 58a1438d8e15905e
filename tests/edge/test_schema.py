import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from services.contract.version import VERSION
from services.edge.app import ROUTES
from services.edge.schema import TEXTS, types_in
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
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


async def test_every_route_is_described_with_the_schema_of_its_body(
    document: dict[str, Any],
) -> None:
    routes = {
        (method, re.sub(r":\w+}", "}", path))
        for handler in ROUTES
        for path in handler.paths
        for method in handler.http_methods - {"HEAD"}
    }
    assert operations(document).keys() == routes
    for (method, path), operation in operations(document).items():
        assert operation["summary"] and operation["tags"], path
        has_body = method in ("POST", "PATCH", "PUT") and not path.endswith("/cancel")
        assert has_body == ("requestBody" in operation), path


async def test_the_document_is_valid(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)
    for where, operation in operations(document).items():
        parameters = [(each["name"], each["in"]) for each in operation["parameters"]]
        assert len(set(parameters)) == len(parameters), where
        assert [each for each in parameters if each[0] == "session_id"] in (
            [],
            [("session_id", "path")],
            [("session_id", "query")],
        )
        assert set(re.findall(r"{(\w+)}", where[1])) == {
            name for name, place in parameters if place == "path"
        }


async def test_references_of_the_document_resolve(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names and names <= document["components"]["schemas"].keys()


async def test_every_response_has_a_schema_or_an_example(
    document: dict[str, Any],
) -> None:
    for where, operation in operations(document).items():
        first, *_ = operation["responses"].values()
        assert first["description"] and all(first["content"].values()), where
        assert operation["responses"]["default"]["$ref"].startswith("#/components/responses/")
    error = document["components"]["responses"]["Error"]
    assert error["content"]["application/json"]["schema"] and "Retry-After" in error["headers"]
    status = operations(document)["GET", "/status"]["responses"]["200"]["content"]
    name = status["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "workers" in document["components"]["schemas"][name]["properties"]


async def test_document_describes_keys_and_headers(document: dict[str, Any], bus: Bus) -> None:
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer" and schemes["apiKey"]["name"] == "X-API-Key"
    described = operations(document)
    assert described["POST", "/chat"]["security"] == [{"bearer": []}, {"apiKey": []}, {}]
    assert "security" not in described["GET", "/healthz"]
    headers = {
        where: {each["name"] for each in operation["parameters"] if each["in"] == "header"}
        for where, operation in described.items()
    }
    assert headers["POST", "/chat"] >= {"Idempotency-Key", "X-Request-Id"}
    assert "Last-Event-ID" in headers["GET", "/chat/{request_id}"]
    async with edge_on(bus, keys="acme:s3cret") as locked:
        closed = (await locked.get("/schema/openapi.json")).json()
    assert {} not in operations(closed)["POST", "/chat"]["security"]


async def test_examples_of_bodies_are_accepted(
    document: dict[str, Any], http: httpx.AsyncClient, nats_url: str
) -> None:
    types = types_in(TEXTS.read_text(encoding="utf-8"))
    examples = {}
    for (_, path), operation in operations(document).items():
        if "requestBody" in operation:
            (content,) = operation["requestBody"]["content"].values()
            name = content["schema"]["$ref"].rpartition("/")[2]
            msgspec.convert(content["example"], types[name])
            examples[path] = content["example"]
    async with scripted_worker(nats_url, HELLO):
        for path in ("/chat", "/v1/chat/completions", "/v1/completions"):
            answer = await http.post(path, json=examples[path])
            assert answer.status_code == 200, path


async def test_every_field_description_is_used(document: dict[str, Any]) -> None:
    texts = msgspec.yaml.decode(TEXTS.read_bytes())["x-fields"]
    names = {
        each["name"]
        for operation in operations(document).values()
        for each in operation["parameters"]
    }
    for kind, schema in document["components"]["schemas"].items():
        for name in schema.get("properties", ()):
            names |= {name, f"{kind}.{name}"}
    assert {name.strip("{}") for name in texts} <= names


async def test_field_of_one_type_has_its_own_description(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    prompts = [schemas[kind]["properties"]["prompt"] for kind in ("ChatBody", "CompletionBody")]
    assert [each["description"][:10] for each in prompts] == ["The user's", "A text to "]


async def test_query_parameters_have_their_constraints(document: dict[str, Any]) -> None:
    described = {
        each["name"]: each for each in operations(document)["GET", "/messages"]["parameters"]
    }
    assert (
        described["limit"]["schema"]["maximum"] == 1000 and described["session_id"]["in"] == "query"
    )


async def test_document_is_served_as_json_and_yaml(
    http: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    assert (await http.get("/schema")).json() == document
    for path in ("/schema/openapi.yaml", "/schema/openapi.yml"):
        assert msgspec.yaml.decode((await http.get(path)).content) == document
    for path in ("swagger", "redoc", "rapidoc", "elements"):
        assert (await http.get(f"/schema/{path}")).status_code == 404


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.fixture(scope="module")
async def without_page(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge whose chat page is turned off."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, has_page=False) as client:
        yield client


async def test_html_pages_load_nothing_from_other_hosts(
    http: httpx.AsyncClient, without_page: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    for client, path in ((without_page, "/"), (http, "/schema")):
        page = await client.get(path, headers=BROWSER)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert not re.findall(r"<script|<img|<link|@import|\bsrc=|\bon\w+=", page.text)
        targets = re.findall(r'href="([^"]*)"', page.text)
        assert targets and all(target.startswith(("/", "#")) for target in targets)
        (style,) = re.findall("<style>(.*)</style>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page.headers["content-security-policy"]
        assert "default-src 'none'" in page.headers["content-security-policy"]
    for method, path in operations(document):
        assert f"<code>{method} {path}</code>" in page.text
    ids = set(re.findall(r'id="([^"]*)"', page.text))
    assert {target[1:] for target in targets if target.startswith("#")} <= ids


async def test_greeting_links_the_schema_and_escapes_the_host(
    http: httpx.AsyncClient, without_page: httpx.AsyncClient
) -> None:
    greeting = (await http.get("/")).json()
    assert greeting["status"] == "online"
    assert (greeting["schema"], greeting["details"]) == ("/schema", "/status")
    page = await without_page.get("/", headers=BROWSER | {"Host": "a<b>:1"})
    assert "<b>" not in page.text


async def test_document_has_title_and_version(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/schema/openapi.json")).json()
    assert (schema["info"]["title"], schema["info"]["version"]) == ("FineTuneLLM", VERSION)
    assert "/chat" in schema["paths"]


async def test_parameters_in_the_path_have_their_constraints(document: dict[str, Any]) -> None:
    described = operations(document)
    session, *_ = described["DELETE", "/sessions/{session_id}"]["parameters"]
    assert (session["schema"]["minLength"], session["schema"]["maxLength"]) == (1, 128)


async def test_query_parameters_can_not_be_null(document: dict[str, Any]) -> None:
    before = next(
        each
        for each in operations(document)["GET", "/messages"]["parameters"]
        if each["name"] == "before"
    )
    assert before["schema"] == {"type": "string", "pattern": "^[0-9]{1,14}-[1-9][0-9]{0,17}$"}


async def test_patterns_are_those_of_ecmascript(document: dict[str, Any]) -> None:
    assert "\\Z" not in json.dumps(document).replace("\\\\", "\\")


async def test_event_streams_describe_an_event(document: dict[str, Any]) -> None:
    streams = [
        response["content"]["text/event-stream"]
        for operation in operations(document).values()
        for response in operation["responses"].values()
        if "text/event-stream" in response.get("content", {})
    ]
    assert len(streams) > 5
    assert all("data" in each["schema"]["properties"] for each in streams)


@pytest.mark.parametrize("path", ["/v1/messages", "/api/show", "/v1/completions", "/chat"])
async def test_errors_have_the_documented_form(
    document: dict[str, Any], http: httpx.AsyncClient, path: str
) -> None:
    reference = operations(document)["POST", path]["responses"]["default"]["$ref"]
    form = document["components"]["responses"][reference.rpartition("/")[2]]
    schema = form["content"]["application/json"]["schema"]
    error = (await http.post(path, content="{")).json()
    assert error.keys() == schema["properties"].keys()
    fields = schema["properties"]["error"].get("properties")
    assert (
        isinstance(error["error"], str)
        if fields is None
        else error["error"].keys() == fields.keys()
    )
