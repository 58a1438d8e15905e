import httpx

from tests.fakes import HELLO, scripted_worker


async def test_json_is_compressed_for_who_takes_it(http: httpx.AsyncClient) -> None:
    got = await http.get("/schema/openapi.json", headers={"Accept-Encoding": "br;q=1, gzip"})
    plain = await http.get("/schema/openapi.json", headers={"Accept-Encoding": "identity"})
    assert got.headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in got.headers["vary"].split(",")
    assert int(got.headers["content-length"]) < len(got.content) / 4
    assert "content-encoding" not in plain.headers and plain.json() == got.json()


async def test_it_is_not_for_who_refuses_it_nor_where_it_is_not_worth_it(
    http: httpx.AsyncClient,
) -> None:
    for accepted in ("gzip;q=0", "", "br"):
        got = await http.get("/schema/openapi.json", headers={"Accept-Encoding": accepted})
        assert "content-encoding" not in got.headers
    small = await http.get("/healthz", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers and small.json() == {"status": "alive"}


async def test_a_stream_never_is(http: httpx.AsyncClient, nats_url: str) -> None:
    headers = {"Accept-Encoding": "gzip"}
    body = {"prompt": "hi" * 1000}
    asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with scripted_worker(nats_url, HELLO):
        for path, content in (("/chat", body), ("/v1/chat/completions", asked)):
            got = await http.post(path, json=content, headers=headers)
            assert "content-encoding" not in got.headers and "data: " in got.text


async def test_errors_are_compressed_like_all_json(http: httpx.AsyncClient) -> None:
    got = await http.post(
        "/clear-history", json={"x" * 2000: 1}, headers={"Accept-Encoding": "gzip"}
    )
    assert got.status_code == 400 and got.headers["content-encoding"] == "gzip"
    assert got.json()["error"]["code"] == "invalid_request"
