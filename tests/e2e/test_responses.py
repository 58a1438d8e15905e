"""Responses across deaths of processes, with OpenAI's client, real processes and the demo model."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.stack import Process, Stack, running_stack
from tests.servers import free_port, wait_for

LENGTH = 200
ENDLESS = {"grammar": "root ::= [a-z] root", "max_output_tokens": LENGTH}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("responses"), slow=True) as stack:
        yield stack


def client_of(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.http.base_url}/v1", api_key="any", max_retries=5)


def ask(client: openai.OpenAI, question: Any, **fields: Any) -> Any:
    return client.responses.create(model="demo", input=question, temperature=0, **fields)


def text_of(events: list[Any]) -> str:
    return "".join(getattr(event, "delta", "") for event in events)


def workers(client: openai.OpenAI) -> list[dict[str, Any]]:
    """Return the workers that are ready."""
    status = httpx.get(f"{client.base_url}../status").json()
    return [worker for worker in status["workers"] if worker["state"] == "ready"]


def test_branches_survive_the_death_of_every_process(stack: Stack) -> None:
    with client_of(stack) as client:
        root = ask(client, "my name is Ada")
        left = ask(client, "hello", previous_response_id=root.id)
        for process in (stack.edge, stack.history, stack.inference, stack.nats):
            process.stop(signal.SIGKILL)
        for process in (stack.nats, stack.history, stack.inference, stack.edge):
            process.start()
        stack.wait_until_ready()
        assert client.responses.retrieve(left.id).output == left.output
        for parent in (root, left):
            got = ask(client, "what is my name?", previous_response_id=parent.id)
            assert "Ada" in got.output_text and got.previous_response_id == parent.id


def test_stream_continues_after_edge_and_worker_are_killed(stack: Stack) -> None:
    """The edge dies in mid-stream, and the worker while another edge continues the stream."""
    folder, environ = stack.edge.log.parent / "others", stack.edge.environ
    folder.mkdir()
    port = free_port()
    edge = Process("services.edge", port, environ | {"EDGE_PORT": str(port)}, folder)
    worker = Process("tests.slow_inference", 0, stack.inference.environ, folder)
    with ExitStack() as cleanup:
        for process in (edge, worker):
            cleanup.callback(process.stop, signal.SIGKILL)
        edge.start()
        first_worker = stack.next_report().worker_id
        worker.start()
        first = cleanup.enter_context(client_of(stack))
        url = f"http://127.0.0.1:{port}/v1"
        second = cleanup.enter_context(openai.OpenAI(base_url=url, api_key="any", max_retries=5))
        wait_for(lambda: len(workers(second)) == 2, "the second worker")
        stream = ask(first, "hello", stream=True, background=True, extra_body=ENDLESS)
        received: list[Any] = []
        while len(text_of(received)) < 4:
            received.append(next(stream))
        stack.edge.stop(signal.SIGKILL)
        response_id, killed = received[0].response.id, None
        for event in second.responses.retrieve(
            response_id, stream=True, starting_after=received[-1].sequence_number
        ):
            received.append(event)
            busy = [each for each in workers(second) if each["running"]]
            if busy and killed is None:
                killed = stack.inference if busy[0]["worker_id"] == first_worker else worker
                killed.stop(signal.SIGKILL)
        assert killed is not None, "it was killed during the answer"
        found = second.responses.retrieve(response_id)
        assert received[-1].response.output == found.output
        assert text_of(received) == found.output_text
        assert found.usage is not None and found.usage.output_tokens == LENGTH
        numbers = [event.sequence_number for event in received]
        assert numbers == sorted(set(numbers))
