"""
The public APIs. Our own: `chat`, `sessions`, `status`. OpenAI's: `openai_chat`,
`openai_completions`, and `models` with llama-server's token routes.

Both completion endpoints share `completion` (from ChatRequest to response), `objects` (types of
responses) and `openai_requests` (types of bodies). `openai_body` reads their bodies: `fields` lists
what is accepted, and `translation` maps the spellings of other servers to our types.
"""
