from collections.abc import AsyncIterator

import httpx
import openai
import pytest


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of the shared edge, without retries."""
    async with openai.AsyncOpenAI(
        base_url=f"{http.base_url}/v1", api_key="any", max_retries=0
    ) as client:
        yield client
