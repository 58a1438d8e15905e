"""
`POST /v1/embeddings` of OpenAI's API, and `POST /v1/rerank` of Jina's API, which Cohere's client
expects at `/v2/rerank`, and that of text-embeddings-inference (TEI) at `/rerank`.
"""

import msgspec
from litestar import post
from litestar.types import ASGIApp
from msgspec import UNSET, Raw

from services.client.embedding_client import EmbeddingClient, input_bytes
from services.contract.embeddings import EmbedRequest, RerankRequest, Scores, floats_of
from services.edge.api.completion import respond_whole
from services.edge.api.objects import (
    DocumentText,
    EmbeddingList,
    EmbeddingObject,
    EmbeddingUsage,
    Ranking,
    RerankResult,
    TeiResult,
)
from services.edge.api.openai_requests import EmbeddingBody, RerankBody
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest


@post("/v1/embeddings", status_code=200)
async def embeddings(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, EmbeddingBody)
    message = EmbedRequest(body.inputs, body.model, body.dimensions)
    is_base64 = body.encoding_format == "base64"
    with edge.embedding_client(tenant, sum(map(input_bytes, message.input))) as client:
        return await respond_whole(request, _embed(client, message, is_base64))


@post(["/v1/rerank", "/v2/rerank", "/rerank"], status_code=200)
async def rerank(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, RerankBody)
    documents = body.candidates
    size = sum(map(input_bytes, documents)) + len(documents) * input_bytes(body.query)
    with edge.embedding_client(tenant, size) as client:
        return await respond_whole(request, _rerank(client, body))


async def _embed(client: EmbeddingClient, request: EmbedRequest, is_base64: bool) -> EmbeddingList:
    """Encode each batch when it arrives: all at once would block other requests for long."""
    data: list[Raw] = []
    model, tokens = "", 0
    async for part in client.embed_in_batches(request):
        model, tokens = part.model, tokens + part.prompt_tokens
        for index, vector in enumerate(part.vectors, start=len(data)):
            embedding = vector if is_base64 else floats_of(vector)
            data.append(Raw(msgspec.json.encode(EmbeddingObject(index, embedding))))
    return EmbeddingList(tuple(data), model, EmbeddingUsage(tokens, tokens))


async def _rerank(client: EmbeddingClient, body: RerankBody) -> Ranking | list[TeiResult]:
    documents = body.candidates
    reply = await client.rerank(RerankRequest(body.query, documents, body.model))
    order = _best_first(reply)[: body.top_n]
    if body.texts is not None:
        texts = documents if body.return_text else None
        return [TeiResult(index, score, texts[index] if texts else UNSET) for index, score in order]
    shown = documents if body.return_documents else None
    results = (
        RerankResult(index, score, DocumentText(shown[index]) if shown else UNSET)
        for index, score in order
    )
    usage = EmbeddingUsage(reply.prompt_tokens, reply.prompt_tokens)
    return Ranking(tuple(results), reply.model, usage)


def _best_first(reply: Scores) -> list[tuple[int, float]]:
    """Return (index, score) of each document; of equal ones the first comes first."""
    return sorted(enumerate(reply.scores), key=lambda each: each[1], reverse=True)
