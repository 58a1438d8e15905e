"""OpenAI's client on /v1/embeddings, and /v1/rerank, with a process for each model."""

import base64
import signal
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest

from bench.embedding_models import LAST, RANK, TINY, write
from services.inference.engine.embedding import normalize
from services.inference.engine.llama_embedder import LlamaEmbedder
from tests.e2e.stack import Process, Stack, running_stack
from tests.servers import wait_for

TEXTS = ["hello you", "a", "Grüß dich 🙂", "x y z " * 12]
WORDS = "some words of a text " * 4
SLOW = TINY._replace(layers=16)
HI = [{"role": "user", "content": "hello"}]


class Models:
    """A chat model, an embedding model of which two workers serve a copy, and two rerankers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shape = TINY._replace(context=256)
        self.paths = {
            "bert": write("bert", folder / "bert.gguf"),
            "qwen": write("qwen3", folder / "qwen.gguf", shape, LAST),
            "bert-rank": write("bert", folder / "bert-rank.gguf", pooling=RANK),
            "qwen-rank": write("qwen3", folder / "qwen-rank.gguf", shape, RANK),
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stack(models: Models) -> Iterator[Stack]:
    with running_stack(models.folder) as stack, ExitStack() as workers:
        for path in models.paths.values():
            workers.enter_context(running_worker(stack, path))
        wait_for(lambda: ready_models(stack) == {"demo", *models.paths}, "all models")
        yield stack


@contextmanager
def running_worker(stack: Stack, model: Path, number: int = 1) -> Iterator[Process]:
    folder = model.with_name(f"{model.stem}-{number}")
    folder.mkdir()
    environ = stack.inference.environ | {"MODEL_PATH": str(model)}
    process = Process("services.inference", 0, environ, folder)
    process.start()
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL)


def ready_models(stack: Stack) -> set[str]:
    return {each["model"]["name"] for each in stack.status()["workers"] if each["state"] == "ready"}


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.http.base_url}/v1", api_key="any", max_retries=0
    ) as client:
        yield client


def expected(path: Path, texts: list[str], dimensions: int | None = None) -> npt.NDArray[Any]:
    embedder = LlamaEmbedder(path, context=256, threads=1, gpu_layers=0, on_progress=lambda _: True)
    rows = [embedder.embed([embedder.tokenize_input(text)])[0] for text in texts]
    embedder.close()
    return normalize(np.stack(rows), dimensions)


@pytest.mark.parametrize("model", ["bert", "qwen"])
@pytest.mark.parametrize("dimensions", [None, 8])
def test_openai_client_gets_embeddings(
    client: openai.OpenAI, models: Models, model: str, dimensions: int | None
) -> None:
    more: Any = {"dimensions": dimensions} if dimensions else {}
    default = client.embeddings.create(model=model, input=TEXTS, **more)  # base64, decoded
    floats = client.embeddings.create(model=model, input=TEXTS, encoding_format="float", **more)
    vectors = np.array([each.embedding for each in default.data])
    assert vectors.shape == (len(TEXTS), dimensions or TINY.width)
    assert np.allclose(vectors, expected(models.paths[model], TEXTS, dimensions), atol=1e-5)
    assert np.allclose(vectors, [each.embedding for each in floats.data], atol=1e-7)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert [each.index for each in default.data] == list(range(len(TEXTS)))
    assert default.model == model and default.usage.prompt_tokens == default.usage.total_tokens > 20


def test_base64_is_little_endian_float32(stack: Stack, models: Models) -> None:
    body = {"model": "bert", "input": "hello you", "encoding_format": "base64"}
    reply = stack.http.post("/v1/embeddings", json=body).json()
    data = base64.b64decode(reply["data"][0]["embedding"], validate=True)
    vector = struct.unpack(f"<{TINY.width}f", data)
    assert np.allclose(vector, expected(models.paths["bert"], ["hello you"])[0], atol=1e-6)
    assert reply["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_token_ids_give_the_embedding_of_their_text(client: openai.OpenAI) -> None:
    ids = [2, 22, 214, 399, 39, 483, 3]  # [CLS] hello you [SEP]
    text = client.embeddings.create(model="bert", input="hello you").data[0].embedding
    one = client.embeddings.create(model="bert", input=ids)
    both = client.embeddings.create(model="bert", input=[ids, ids[:4]])
    assert np.allclose(one.data[0].embedding, text, atol=1e-6)
    assert np.allclose(both.data[0].embedding, text, atol=1e-5)
    assert [len(each.data) for each in (one, both)] == [1, 2]
    assert (one.usage.prompt_tokens, both.usage.prompt_tokens) == (7, 11)


def test_2048_inputs_keep_their_order(client: openai.OpenAI, models: Models) -> None:
    texts = [f"text {number} {'long ' * (number % 7)}" for number in range(2048)]
    reply = client.embeddings.create(model="qwen", input=texts)
    some = [0, 1, 1000, 2047]
    assert [each.index for each in reply.data] == list(range(2048))
    wanted = expected(models.paths["qwen"], [texts[number] for number in some])
    assert np.allclose([reply.data[number].embedding for number in some], wanted, atol=1e-5)


@pytest.mark.parametrize("model", ["bert-rank", "qwen-rank"])
def test_rerank_sorts_documents_by_score(stack: Stack, models: Models, model: str) -> None:
    body = {"model": model, "query": "what is it", "documents": [TEXTS[0], {"text": TEXTS[1]}, ""]}
    reply = stack.http.post("/v1/rerank", json=body).json()
    scores = [each["relevance_score"] for each in reply["results"]]
    assert scores == sorted(scores, reverse=True) and all(0 < score < 1 for score in scores)
    assert sorted(each["index"] for each in reply["results"]) == [0, 1, 2]
    assert reply["model"] == model and reply["usage"]["total_tokens"] > 20
    best = stack.http.post("/v2/rerank", json=body | {"top_n": 1, "return_documents": True}).json()
    (result,) = best["results"]
    assert result["index"] == reply["results"][0]["index"]
    assert result["document"] == {"text": [TEXTS[0], TEXTS[1], ""][result["index"]]}
    tei = {"model": model, "query": "what is it", "texts": TEXTS[:2], "return_text": True}
    listed = stack.http.post("/rerank", json=tei).json()
    assert sorted((each["index"], each["text"]) for each in listed) == [(0, TEXTS[0]), (1, "a")]
    assert listed[0]["score"] >= listed[1]["score"]


@pytest.mark.parametrize(
    ("path", "body", "code", "why"),
    [
        ("embeddings", {"input": "x " * 200}, "context_length_exceeded", "`input[0]` has 202"),
        ("embeddings", {"input": ["a", "x " * 200]}, "context_length_exceeded", "`input[1]`"),
        ("embeddings", {"input": ""}, "invalid_request", "`input` must not be empty"),
        ("embeddings", {"input": ["a", ""]}, "invalid_request", "must not be empty"),
        ("embeddings", {"input": []}, "invalid_request", "must not be empty"),
        ("embeddings", {"input": [[]]}, "invalid_request", "must not be empty"),
        ("embeddings", {"input": [["a"]]}, "invalid_request", "`input[...]"),
        ("embeddings", {"input": ["a", 1]}, "invalid_request", "a list of token ids, or a list"),
        ("embeddings", {"input": ["a"] * 2049}, "invalid_request", "up to 2,048"),
        ("embeddings", {"input": [[1]] * 2049}, "invalid_request", "more than 2,048 items"),
        ("embeddings", {"input": [640]}, "invalid_request", "the model's last token is 639"),
        ("embeddings", {"input": [-1]}, "invalid_request", "`input[...]"),
        ("embeddings", {}, "invalid_request", "`input` is missing"),
        ("embeddings", {"input": "a", "dimensions": 65}, "invalid_request", "have 64"),
        ("embeddings", {"input": "a", "dimensions": 0}, "invalid_request", "at least 1"),
        ("embeddings", {"input": "a", "encoding_format": "int8"}, "invalid_request", "int8"),
        ("embeddings", {"input": "a", "normalize": False}, "invalid_request", "`normalize`"),
        ("embeddings", {"input": "a", "output_dtype": "int8"}, "invalid_request", "encoding_for"),
        ("embeddings", {"input": "a", "model": "no"}, "model_not_found", "available: bert, "),
        ("rerank", {"query": "", "documents": ["a"]}, "invalid_request", "`query` must not be"),
        ("rerank", {"query": "a", "documents": []}, "invalid_request", "must not be empty"),
        ("rerank", {"query": "a"}, "invalid_request", "`documents`, or `texts`, must be"),
        ("rerank", {"query": "a", "documents": [{"title": "b"}]}, "invalid_request", "`text`"),
        ("rerank", {"query": "a", "documents": [{"text": 1}]}, "invalid_request", "a string"),
        ("rerank", {"query": "a", "documents": ["a"] * 2049}, "invalid_request", "2,048"),
        ("rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "invalid_request", "`top_n`"),
        (
            "rerank",
            {"query": "x " * 50, "documents": ["a", "x " * 50]},
            "context_length_exceeded",
            "`documents[1]` has 102 tokens",
        ),
    ],
)
def test_invalid_request_is_a_4xx_that_names_the_field(
    stack: Stack, path: str, body: dict[str, Any], code: str, why: str
) -> None:
    model = "bert" if path == "embeddings" else "bert-rank"
    reply = stack.http.post(f"/v1/{path}", json={"model": model} | body)
    error = reply.json()["error"]
    assert error["code"] == code and why.partition("...")[0] in error["message"], error
    assert reply.status_code == (404 if code == "model_not_found" else 400)


@pytest.mark.parametrize(
    ("path", "model", "body", "why"),
    [
        ("embeddings", "demo", {"input": "a"}, "is a chat model: use it with POST /v1/chat/comp"),
        ("embeddings", "bert-rank", {"input": "a"}, "is a reranker: use it with POST /v1/rerank"),
        ("rerank", "bert", {"query": "a", "documents": ["a"]}, "is an embedding model: use it w"),
        ("chat/completions", "bert", {"messages": HI}, "or name a chat model; available: demo"),
        ("completions", "bert-rank", {"prompt": "a"}, "or name a chat model; available: demo"),
        ("tokenize", "bert", {"content": "a"}, "is an embedding model"),
    ],
)
def test_model_of_another_kind_is_a_400_with_advice(
    stack: Stack, path: str, model: str, body: dict[str, Any], why: str
) -> None:
    reply = stack.http.post(f"/v1/{path}", json=body | {"model": model})
    assert reply.status_code == 400
    assert why in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "model"


def test_request_without_a_model_gets_one_of_its_kind(stack: Stack) -> None:
    assert stack.http.post("/v1/embeddings", json={"input": "a"}).json()["model"] in (
        "bert",
        "qwen",
    )
    assert stack.http.post("/v1/chat/completions", json={"messages": HI}).json()["model"] == "demo"
    assert stack.chat("hello", "embeddings").end["done"] is True


def test_models_say_what_they_are_for(stack: Stack) -> None:
    found = {each["id"]: each for each in stack.http.get("/v1/models").json()["data"]}
    kinds = {name: model["type"] for name, model in found.items()}
    assert kinds == {
        "demo": "chat", "demo:pirate": "chat", "bert": "embedding", "qwen": "embedding",
        "bert-rank": "rerank", "qwen-rank": "rerank",
    }  # fmt: skip
    assert found["bert"]["meta"]["n_embd"] == TINY.width
    assert "n_embd" not in found["demo"]["meta"]


def test_requests_of_a_killed_worker_go_to_another(stack: Stack, models: Models) -> None:
    path = write("bert", models.folder / "twice.gguf")
    body = {"model": "twice", "input": [WORDS] * 20}
    is_killed = threading.Event()

    def ask_all_the_time() -> list[int]:
        statuses = []
        while not is_killed.is_set():
            statuses.append(stack.http.post("/v1/embeddings", json=body).status_code)
        return statuses

    with (
        running_worker(stack, path, 1) as first,
        running_worker(stack, path, 2),
        ThreadPoolExecutor(4) as pool,
    ):
        wait_for(lambda: len(workers_of(stack, "twice", "ready")) == 2, "both")
        callers = [pool.submit(ask_all_the_time) for _ in range(4)]
        wait_for(lambda: busy(stack, "twice") == [True, True], "requests at both")
        first.stop(signal.SIGKILL)
        is_killed.set()
        statuses = [status for caller in callers for status in caller.result(30)]
    assert len(statuses) >= 4 and {*statuses} == {200}


def test_sigterm_lets_a_worker_finish(stack: Stack, models: Models) -> None:
    last = write("bert", models.folder / "last.gguf", SLOW)
    with running_worker(stack, last) as leaving, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: "last" in ready_models(stack), "the worker")
        body = {"model": "last", "input": [WORDS] * 90}  # one batch
        answer = pool.submit(stack.http.post, "/v1/embeddings", json=body)
        wait_for(lambda: busy(stack, "last") == [True], "its request")
        assert leaving.stop(signal.SIGTERM) == 0
        assert answer.result(30).status_code == 200


def workers_of(stack: Stack, model: str, state: str) -> list[dict[str, Any]]:
    workers = stack.status()["workers"]
    return [each for each in workers if each["name"] == model and each["state"] == state]


def busy(stack: Stack, model: str) -> list[bool]:
    """Return whether each ready worker of the model has requests."""
    return [each["running"] > 0 for each in workers_of(stack, model, "ready")]
