"""Keys, .creds files, TLS and inboxes of NATS, against real servers."""

import asyncio
import base64
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import nkeys
import pytest
import uvloop

from services.contract.messages import Empty
from services.runtime.access import NatsAccess, public_key, read_credentials
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting, ServiceSettings
from tests.certificates import make_certificates, with_tls
from tests.e2e.stack import Process, plain_environment
from tests.history.samples import until
from tests.servers import Server, free_port, nats_server, running, wait_for

OPERATOR, ACCOUNT, USER = (
    nkeys.PREFIX_BYTE_OPERATOR,
    nkeys.PREFIX_BYTE_ACCOUNT,
    nkeys.PREFIX_BYTE_USER,
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of certificates (tests/certificates.py)."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def new_seed(kind: int = USER) -> str:
    seed: bytes = nkeys.encode_seed(os.urandom(32), kind)
    return seed.decode()


def server_with(folder: Path, config: str) -> Server:
    (folder / "server.conf").write_text(config)
    server = nats_server(folder)
    server.command[server.command.index("-c") + 1] = str(folder / "server.conf")
    return server


def server_of(folder: Path, seed: str, permissions: str = "") -> Server:
    """Return a server with one user."""
    user = f"{{ nkey: {public_key(seed)}, permissions: {{ {permissions} }} }}"
    return server_with(folder, f"authorization {{ users: [ {user} ] }}")


def access(**settings: str | Path) -> NatsAccess:
    given = {f"nats_{name}": str(value) for name, value in settings.items()}
    return NatsAccess.of(ServiceSettings(**given))  # type: ignore[arg-type]


async def answers(server: Server, access: NatsAccess, seconds: float = 1) -> bool:
    """Return whether the server accepts the connection in time."""
    url = f"nats://127.0.0.1:{server.port}"
    try:
        async with asyncio.timeout(seconds), Bus.connect(url, "test", access) as bus:
            return await bus.is_responsive()
    except TimeoutError:
        return False


# --- keys -----------------------------------------------------------------------------------------


async def test_seed_file_authenticates_its_user(tmp_path: Path) -> None:
    seed, file = new_seed(), tmp_path / "user.nk"
    file.write_text(f"# made by hand\n{seed}\n")
    with running(server_of(tmp_path, seed)) as server:
        assert await answers(server, access(creds=file))
        file.write_text(new_seed())
        with pytest.raises(InvalidSetting, match="rejects the credentials.*check NATS_CREDS"):
            await answers(server, access(creds=file))
        with pytest.raises(InvalidSetting, match="rejects the credentials"):
            await answers(server, access())


async def test_creds_file_authenticates_with_its_jwt(tmp_path: Path) -> None:
    """A server in operator mode knows no users, only who may sign their JWTs."""
    operator, account, user = new_seed(OPERATOR), new_seed(ACCOUNT), new_seed()
    account_jwt = jwt(operator, account, type="account", limits=UNLIMITED)
    config = (
        f"operator: {jwt(operator, operator, type='operator')}\n"
        "resolver: MEMORY\n"
        f"resolver_preload: {{ {public_key(account)}: {account_jwt} }}\n"
    )
    file, server = tmp_path / "user.creds", server_with(tmp_path, config)
    server.command.remove("-js")  # would need a system account
    with running(server):
        file.write_text(creds(jwt(account, user, type="user", **NO_LIMIT), user))
        assert await answers(server, access(creds=file))
        file.write_text(creds(jwt(new_seed(ACCOUNT), user, type="user", **NO_LIMIT), user))
        with pytest.raises(InvalidSetting, match="rejects the credentials"):
            await answers(server, access(creds=file))


async def test_rotated_seed_is_used_at_the_reconnect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, file = new_seed(), new_seed(), tmp_path / "user.nk"
    file.write_text(old)
    with running(server_of(tmp_path, old)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test", access(creds=file)) as bus:
            server_of(tmp_path, new)  # writes its configuration, which the running one reloads
            server.signal(signal.SIGHUP)
            await until(lambda: is_logged(caplog, "check NATS_CREDS"))
            assert not bus.connected
            file.write_text(new)
            await until(bus.is_responsive)
            assert (await ask_oneself(bus)) == Empty()
    rejections = [each for each in caplog.messages if "Authorization Violation" in each]
    assert len(rejections) == 1 and "Traceback" not in caplog.text


async def test_user_in_the_url_replaces_the_credentials(tmp_path: Path) -> None:
    (tmp_path / "user.nk").write_text(seed := new_seed())
    users = f'[ {{ nkey: {public_key(seed)} }}, {{ user: "ann", password: "pw" }} ]'
    with running(server_with(tmp_path, f"authorization {{ users: {users} }}")) as server:
        url = f"nats://ann:wrong@127.0.0.1:{server.port}"
        with pytest.raises(InvalidSetting, match="rejects"):
            async with Bus.connect(url, "test", access(creds=tmp_path / "user.nk")):
                pass
        url = f"nats://ann:pw@127.0.0.1:{server.port}"
        async with Bus.connect(url, "test", access(creds=tmp_path / "user.nk")) as bus:
            assert await bus.is_responsive()


async def test_server_that_is_too_busy_to_authenticate_is_asked_again() -> None:
    attempts = 0

    async def time_out(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.write(b'INFO {"auth_required": true, "nonce": "x", "max_payload": 1000}\r\n')
        await reader.readline()
        writer.write(b"-ERR 'Authentication Timeout'\r\n")
        writer.close()

    port = free_port()
    async with await asyncio.start_server(time_out, "127.0.0.1", port):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1), Bus.connect(f"nats://127.0.0.1:{port}", "test"):
                pass
    assert attempts > 1


async def test_key_is_not_used_at_a_server_without_users(tmp_path: Path) -> None:
    (tmp_path / "user.nk").write_text(new_seed())
    with running(nats_server(tmp_path)) as server:
        mine = access(creds=tmp_path / "user.nk", inbox_prefix="_INBOX.me")
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test", mine) as bus:
            assert (await ask_oneself(bus)) == Empty()


async def test_refused_subjects_are_logged_once_with_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "user.nk").write_text(seed := new_seed())
    allowed = 'publish: ["mine.>", "_INBOX.>"], subscribe: ["_INBOX.me.>", "mine.>"]'
    with running(server_of(tmp_path, seed, allowed)) as server:
        mine = access(creds=tmp_path / "user.nk", inbox_prefix="_INBOX.me")
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test", mine) as bus:
            for number in range(200):
                await bus.publish(f"theirs.{number}", Empty())
            assert (await ask_oneself(bus)) == Empty(), "the connection stays"
            await until(lambda: is_logged(caplog, "permissions violation"))
    (line,) = [each for each in caplog.messages if "violation" in each]
    assert "deploy/nats/permissions.conf" in line and "NATS_INBOX_PREFIX" in line
    assert "Traceback" not in caplog.text


async def ask_oneself(bus: Bus) -> Empty:
    async def reply(_: str, request: Empty) -> Empty:
        return request

    endpoint = bus.endpoint("ask", f"mine.{time.monotonic_ns()}", Empty, reply)
    await bus.subscribe(endpoint.subject, lambda delivery: bus.respond(delivery, given(Empty())))
    await bus.is_responsive()
    return await bus.request(endpoint.subject, Empty(), Empty)


def given(message: Empty) -> Any:
    async def work(_: object) -> Empty:
        return message

    return work


def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


# --- files that can't be used ---------------------------------------------------------------------


BAD_FILES = {
    "no seed": "hush-hush",
    "the seed of an account": new_seed(ACCOUNT),
    "half a seed": new_seed()[:40],
    "creds without a JWT": f"-----BEGIN NATS USER JWT-----\n\n{new_seed()}\n",
    "empty": "",
    "no text": "\udcff",
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_file_without_credentials_is_named_not_quoted(text: str, tmp_path: Path) -> None:
    file = tmp_path / "user.nk"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidSetting, match="^NATS_CREDS='.*user.nk' can't be used: it is") as bad:
        access(creds=file)
    assert text[:9] not in str(bad.value) or not text


@pytest.mark.parametrize("setting", ["creds", "tls_key"])
def test_key_instead_of_a_file_is_not_quoted(setting: str, certificates: Path) -> None:
    for secret in (new_seed(), (certificates / "key.pem").read_text()):
        with pytest.raises(InvalidSetting, match="it must name a file, not hold its") as error:
            access(**{setting: secret})
        assert secret[:20] not in str(error.value)


def test_credentials_show_no_secret(tmp_path: Path) -> None:
    (tmp_path / "user.nk").write_text(seed := new_seed())
    shown = repr(access(creds=tmp_path / "user.nk")) + repr(read_credentials(tmp_path / "user.nk"))
    assert seed not in shown and "user.nk" in shown


@pytest.mark.parametrize("prefix", ["inbox", "_INBOX.", "_INBOX.*", "chat.reply", "_INBOX. x"])
def test_inbox_prefix_must_be_an_inbox(prefix: str) -> None:
    with pytest.raises(InvalidSetting, match="NATS_INBOX_PREFIX='.*can't be used: set `_INBOX`"):
        access(inbox_prefix=prefix)


def test_wrong_credentials_end_a_service_with_code_2(tmp_path: Path) -> None:
    (tmp_path / "user.nk").write_text(new_seed())
    with running(server_of(tmp_path, new_seed())) as server:
        assert "rejects the credentials" in log_of_history(server, tmp_path / "user.nk")
        assert "No such file or directory. Name" in log_of_history(server, tmp_path / "none.nk")


def log_of_history(server: Server, credentials: Path) -> str:
    """Return the log of a history process that exits with 2."""
    url = {"NATS_URL": f"nats://127.0.0.1:{server.port}", "NATS_CREDS": str(credentials)}
    process = Process("services.history", 0, plain_environment() | url, credentials.parent)
    process.start()
    wait_for(lambda: process.has_died, "its end")
    assert process.stop() == 2
    log = process.log.read_text()
    assert "Traceback" not in log
    return log


# --- TLS ------------------------------------------------------------------------------------------


def test_authority_of_the_server_is_trusted(certificates: Path, tmp_path: Path) -> None:
    """On uvloop, like the services."""
    with running(with_tls(nats_server(tmp_path), certificates)) as server:
        assert uvloop.run(answers(server, access(tls_ca=certificates / "ca.pem")))
        assert not uvloop.run(answers(server, access(tls_ca=certificates / "stranger.pem")))


def test_server_verifies_the_certificate_of_a_client(certificates: Path, tmp_path: Path) -> None:
    def client(name: str) -> NatsAccess:
        pair = {"tls_cert": certificates / f"{name}.pem"}
        pair["tls_key"] = certificates / f"{name}-key.pem"
        return access(tls_ca=certificates / "ca.pem", **pair)

    with running(with_tls(nats_server(tmp_path), certificates, is_mutual=True)) as server:
        assert uvloop.run(answers(server, client("client")))
        for rejected in (client("stranger"), access(tls_ca=certificates / "ca.pem")):
            with pytest.raises(InvalidSetting, match="rejects the credentials.*NATS_TLS_CERT"):
                uvloop.run(answers(server, rejected, seconds=20))


async def test_tls_settings_reject_a_server_without_tls(
    certificates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else who answers instead of the server would get the requests in plaintext."""
    with running(nats_server(tmp_path)) as server:
        assert await answers(server, access())
        assert not await answers(server, access(tls_ca=certificates / "ca.pem"))
    assert "secure connection not available" in caplog.text


def test_certificate_without_its_key_is_rejected(certificates: Path) -> None:
    with pytest.raises(InvalidSetting, match="NATS_TLS_CERT and NATS_TLS_KEY together"):
        access(tls_cert=certificates / "client.pem")
    with pytest.raises(InvalidSetting, match="NATS_TLS_CERT='.*NATS_TLS_KEY are no pair"):
        access(tls_cert=certificates / "client.pem", tls_key=certificates / "key.pem")
    with pytest.raises(InvalidSetting, match="NATS_TLS_KEY='.*No such file"):
        access(tls_cert=certificates / "client.pem", tls_key=certificates / "none.pem")
    with pytest.raises(InvalidSetting, match="NATS_TLS_CA='.*it holds no certificate"):
        access(tls_ca=certificates / "key.pem")


# --- JWTs -----------------------------------------------------------------------------------------
# https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt


NO_LIMIT = dict.fromkeys(("subs", "data", "payload"), -1)
UNLIMITED = NO_LIMIT | {"conn": -1, "wildcards": True}


def jwt(issuer: str, subject: str, **claims: Any) -> str:
    """Return a JWT about a key, signed by the issuer; both are seeds."""
    body = {
        "jti": "x",
        "iat": int(time.time()),
        "iss": public_key(issuer),
        "sub": public_key(subject),
        "name": "test",
        "nats": {"version": 2, **claims},
    }
    header = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(body).encode())}"
    signature: bytes = nkeys.from_seed(bytearray(issuer, "ascii")).sign(signed.encode())
    return f"{signed}.{encoded(signature)}"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def creds(user_jwt: str, seed: str) -> str:
    """Return the text of a .creds file, as `nsc generate creds` writes it."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
