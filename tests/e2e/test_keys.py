"""Keys and limits at two edges that run with the permissions of an installation."""

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import msgspec

from services.edge.key_sources import KeyFile
from services.edge.keys import ApiKey, sha256_of
from tests.e2e.stack import Process, running_stack
from tests.servers import free_port, wait_for

OPS = {"X-API-Key": "the key of ops"}
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 250, "stream": True}


def test_limit_of_tokens_holds_at_two_edges_of_which_one_dies(tmp_path: Path) -> None:
    ops = ApiKey(name="ops", sha256=sha256_of(OPS["X-API-Key"]), admin=True)
    file = tmp_path / "keys.json"
    file.write_bytes(msgspec.json.encode(KeyFile((ops,))))
    with ExitStack() as cleanup:
        stack = cleanup.enter_context(running_stack(tmp_path, slow=True, EDGE_KEYS_FILE=str(file)))
        port = free_port()
        other = Process(
            "services.edge", port, stack.edge.environ | {"EDGE_PORT": str(port)}, tmp_path / "x"
        )
        (tmp_path / "x").mkdir()
        cleanup.callback(other.stop, signal.SIGKILL)
        other.start()
        url = f"http://127.0.0.1:{port}"
        second = cleanup.enter_context(httpx.Client(base_url=url, timeout=30))
        made = stack.http.post(
            "/keys", json={"name": "ann", "tokens_per_minute": 700}, headers=OPS
        ).json()
        ann = {"X-API-Key": made["key"]}

        def accepts_key(http: httpx.Client) -> bool:
            return http.get("/v1/models", headers=ann).status_code == 200

        def ask(http: httpx.Client) -> int:
            with http.stream("POST", "/v1/chat/completions", json=BODY, headers=ann) as response:
                return response.status_code

        for http in (stack.http, second):
            wait_for(partial(accepts_key, http), "the key")

        def start(http: httpx.Client, answers: ExitStack) -> httpx.Response:
            return answers.enter_context(
                http.stream("POST", "/v1/chat/completions", json=BODY, headers=ann)
            )

        # An answer that is left releases its tokens, so all stay open until the last status.
        with ThreadPoolExecutor(10) as pool, ExitStack() as answers:
            started = pool.map(lambda _: start(stack.http, answers), range(10))
            statuses = sorted(each.status_code for each in started)
        assert statuses == [200] * 2 + [429] * 8

        running: list[httpx.Response] = []

        def runs_two() -> bool:
            response = start(second, cleanup)
            if response.status_code == 200:
                running.append(response)
            return len(running) == 2

        wait_for(runs_two, "the release of the tokens of the answers that were left")
        assert int(running[1].headers["x-ratelimit-remaining-tokens"]) < 200
        wait_for(lambda: ask(stack.http) == 429, "the reservation of the other edge")
        other.stop(signal.SIGKILL)
        wait_for(lambda: ask(stack.http) == 200, "the end of its reservations", 30)

        revoked = stack.http.delete("/keys/ann", headers=OPS)
        assert [key["id"] for key in revoked.json()["keys"]] == [made["id"]]
        wait_for(lambda: not accepts_key(stack.http), "the key's end")
