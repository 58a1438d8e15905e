import httpx
import pytest

from tests.fakes import HELLO, scripted_worker


def many(item: str) -> str:
    return ",".join([item] * 150_000)


def schema(items: str) -> str:
    return '{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":[' + items + "]}}}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", "{" + many('"1":1') + "}"),
        ("stop", "[" + many('"a"') + "]"),
        ("response_format", schema(many("[]"))),
        ("response_format", schema(many("1"))),
        ("response_format", schema(",".join(["[]"] * 20_000))),
        ("mood", "[" + many("[]") + "]"),
    ],
    ids=lambda value: value[:20],
)
async def test_oversized_field_is_rejected_by_name(
    http: httpx.AsyncClient, field: str, value: str
) -> None:
    got = await http.post("/chat", content=f'{{"prompt":"hi","{field}":{value}}}')
    assert got.status_code == 413 and f"`{field}` has more than" in got.json()["error"]["message"]


async def test_object_of_thousands_of_fields_is_rejected(http: httpx.AsyncClient) -> None:
    got = await http.post("/chat", json={f"f{number}": 1 for number in range(2000)})
    assert got.status_code == 413 and "more than 1,000 fields" in got.text


async def test_long_prompt_is_not_subject_to_these_limits(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        escaped = b'{"prompt":"%b"}' % (rb"\u0430" * 32_000)  # 64 KB as UTF-8
        assert (await http.post("/chat", content=escaped)).status_code == 200
