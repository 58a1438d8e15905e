import openai
import pytest

from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
from tests.fakes import HELLO, scripted_worker


async def test_openai_client_authenticates_with_its_key(nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, "ada:secret") as http:
        async with openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0
        ) as client:
            async with scripted_worker(nats_url, HELLO) as worker:
                await client.completions.create(model="demo", prompt="hi")
            assert worker.requests[0][0] == "chat.request.ada"
            with pytest.raises(openai.AuthenticationError) as error:
                await client.with_options(api_key="wrong").models.list()
    assert error.value.type == "authentication_error"
