"""The chat page's files: who gets them, how they are cached, and what the browser may do."""

import gzip
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deploy import vendor
from services.edge.page_files import load_page
from services.edge.settings import EdgeSettings
from services.runtime.bus import Bus
from services.runtime.settings import parse
from tests.edge.conftest import edge_on
from tests.edge.test_errors import error_of

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PREFIX = f"/page/{load_page().digest}"


@pytest.fixture(scope="module")
async def keyed(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key, of an edge with keys."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, keys="ann:secret") as client:
        yield client


async def test_browser_gets_the_page_and_programs_json(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert f'src="page/{load_page().digest}/js/main.js"' in page.text
    assert "Accept" in page.headers["vary"]
    for accept in ("*/*", "application/json"):
        greeting = await http.get("/", headers={"Accept": accept})
        assert greeting.json()["status"] == "online"


async def test_page_turned_off_leaves_the_welcome(nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, has_page=False) as http:
        welcome = await http.get("/", headers=BROWSER)
        assert "just chat" in welcome.text and "<script" not in welcome.text
        assert (await http.get(f"{PREFIX}/js/main.js")).status_code == 404
    assert parse(EdgeSettings, {"EDGE_PAGE": "false"}).edge_page is False


async def test_page_and_its_files_need_no_key(keyed: httpx.AsyncClient) -> None:
    assert (await keyed.get("/", headers=BROWSER)).status_code == 200
    assert (await keyed.get(f"{PREFIX}/js/main.js")).status_code == 200
    assert (await keyed.get("/sessions")).status_code == 401


async def test_policy_allows_own_scripts_only(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src)", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_files_are_kept_forever_and_the_page_is_checked(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    file = await http.get(f"{PREFIX}/js/main.js")
    assert page.headers["cache-control"] == "no-cache"
    assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
    for path, known in (("/", page), (f"{PREFIX}/js/main.js", file)):
        headers = BROWSER | {"If-None-Match": known.headers["etag"]}
        unchanged = await http.get(path, headers=headers)
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        other = await http.get(path, headers=BROWSER | {"If-None-Match": '"other"'})
        assert other.status_code == 200


async def test_file_of_another_version_is_not_kept(http: httpx.AsyncClient) -> None:
    file = await http.get("/page/0123456789abcdef/js/main.js")
    assert file.status_code == 200 and file.headers["cache-control"] == "no-cache"


async def test_text_is_compressed_once(http: httpx.AsyncClient) -> None:
    path = f"{PREFIX}/vendor/marked.js"
    async with http.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["content-encoding"] == "gzip"
        raw = b"".join([part async for part in response.aiter_raw()])
    plain = await http.get(path, headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(raw) == plain.content and len(raw) < len(plain.content) / 2
    assert response.headers["etag"] != plain.headers["etag"]
    font = await http.get(f"{PREFIX}/vendor/katex/fonts/KaTeX_Main-Regular.woff2")
    assert font.headers["content-type"] == "font/woff2"
    assert "content-encoding" not in font.headers


@pytest.mark.parametrize(
    "path",
    [
        "../settings.py",
        "..%2fsettings.py",
        "js/../../settings.py",
        "js/%2e%2e/%2e%2e/settings.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "index.html",
        "js",
        "js/",
        "js/main.js%00",
        "JS/MAIN.JS",
    ],
)
async def test_nothing_but_listed_files_is_served(keyed: httpx.AsyncClient, path: str) -> None:
    url = httpx.URL(str(keyed.base_url), raw_path=f"{PREFIX}/{path}".encode())
    response = await keyed.get(url)
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


async def test_head_has_the_headers_only(http: httpx.AsyncClient) -> None:
    head = await http.head(f"{PREFIX}/js/main.js")
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == "text/javascript; charset=utf-8"


def test_vendored_files_are_as_published() -> None:
    assert vendor.check(vendor.PAGE) == vendor.check(vendor.TESTS) == []


def test_change_of_a_vendored_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "vendor"
    shutil.copytree(vendor.TESTS, folder)
    (folder / "axe.js").write_text("alert(1)")
    (folder / "more.js").touch()
    assert vendor.check(folder) == ["axe.js", "more.js"]
