"""
The HTTP server in front of NATS. The path of a request, outermost first:

1. `server`: uvicorn, with limits of one connection.
2. `access_log`: the request id and one log line.
3. `request_body`: reads the rest of a rejected body, so that the client receives the response.
4. `app`: Litestar routes the request, checks its origin, finds its tenant (`keys`), compresses
   responses, and turns exceptions into error responses (`errors`).
5. `api`: one module per public API. A handler decodes the body, builds a ChatRequest and sends it
   with `services.client`, or asks history with its `history_requests`.
6. `idempotency`: for /chat, decides whether an earlier answer is returned instead.
7. `sse`: sends the events of an answer, written by the API's encoder.

Handlers share one `context.Edge`. `limits` has every limit and timeout. The reference at /schema
comes from `openapi.yaml`, `schema` and `pages`.
"""
