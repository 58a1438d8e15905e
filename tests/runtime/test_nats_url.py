import pytest

from services.runtime.nats_url import parse_servers
from services.runtime.settings import InvalidSetting


@pytest.mark.parametrize(
    "given, urls",
    [
        ("nats://a:4222", ["nats://a:4222"]),
        ("a", ["nats://a:4222"]),
        ("a:4223, b ,", ["nats://a:4223", "nats://b:4222"]),
        ("nats://a:1,nats://b:2,c:3", ["nats://a:1", "nats://b:2", "nats://c:3"]),
        ("TLS://a/ ", ["tls://a:4222"]),
        ("tls://a,b", ["tls://a:4222", "tls://b:4222"]),
        ("nats://[::1]:4222", ["nats://[::1]:4222"]),
    ],
)
def test_each_server_has_a_scheme_and_a_port(given: str, urls: list[str]) -> None:
    assert list(parse_servers(given).urls) == urls


@pytest.mark.parametrize(
    "user_info, password",
    [
        ("u:plain", "plain"),
        ("u:", ""),
        ("u:p%40ss%2Fw%3Ard%25", "p@ss/w:rd%"),
        ("u:p@ss/w:rd", "p@ss/w:rd"),
        ("u:a,b,:1,c", "a,b,:1,c"),
    ],
)
def test_password_is_decoded_and_may_hold_commas(user_info: str, password: str) -> None:
    for others in ("", ",h:1", ",nats://i:2", f",nats://{user_info}@j:3,k:4"):
        servers = parse_servers(f"nats://{user_info}@host:4222{others}")
        assert (servers.user, servers.password, servers.token) == ("u", password, None)
        assert servers.urls[0] == "nats://host:4222"
        assert password == "" or password not in f"{servers} {servers!r}"


def test_user_without_password_is_a_token() -> None:
    servers = parse_servers("nats://se%2Fcret@host")
    assert (servers.user, servers.password, servers.token) == (None, None, "se/cret")


@pytest.mark.parametrize(
    "given",
    [
        "",
        " , ",
        "nats://u:hush-hush@",
        "nats://u:hush-hush",
        "nats://u:hush-hush@host:port",
        "nats://u:hush-hush@host/path",
        "nats://u:hush-hush@a,nats://u:other@b",
        "nats://u:hush-hush@a,tls://b",
        "wss://u:hush-hush@host",
        "nats://u:hush@hush,hush-hush@host",
    ],
)
def test_invalid_url_is_rejected_without_quoting_it(given: str) -> None:
    with pytest.raises(InvalidSetting, match="NATS_URL can't be used") as error:
        parse_servers(given)
    chain = [error.value, error.value.__cause__ or "", error.value.__context__ or ""]
    assert "hush" not in str(chain[:2])
    assert error.value.__suppress_context__ or error.value.__context__ is None
