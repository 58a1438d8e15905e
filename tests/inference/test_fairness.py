"""Several tenants at one worker, with cancels, timeouts and an engine that fails in the midst."""

import asyncio
import random
from collections import Counter
from uuid import uuid4

import pytest

from services.contract import subjects
from services.contract.conversation import ChatMessage
from services.contract.messages import Accepted, Cancel, ChatRequest, Done, Failed
from services.runtime.deliveries import Delivery
from tests.inference.scripted import StartWorker, Worker, read

TENANTS = ["ann"] * 10 + ["bob", "eve"]


@pytest.mark.parametrize("seed", range(3))
async def test_every_request_of_any_tenant_ends_exactly_once(
    start_worker: StartWorker, seed: int
) -> None:
    dice = random.Random(seed)
    async with start_worker(parallel=2, queue=10, step_seconds=0.001) as worker:
        ends, accepted, late = Counter[str](), set[str](), list[object]()
        prefix = f"_INBOX.{uuid4().hex}"

        def on_event(delivery: Delivery) -> None:
            event = read(delivery.data)
            late.extend([event] * ends[delivery.subject])
            ends[delivery.subject] += isinstance(event, Done | Failed)
            if isinstance(event, Accepted):
                accepted.add(delivery.subject)

        await worker.bus.subscribe(f"{prefix}.*", on_event)
        for number in range(150):
            tenant = f"{worker.tenant}-{dice.choice(TENANTS)}"
            await ask(worker, tenant, f"{prefix}.{number}", str(number), dice)
            if dice.random() < 0.3:
                victim = str(dice.randrange(number + 1))
                await worker.bus.publish(subjects.cancel(tenant, victim), Cancel())
            if dice.random() < 0.05:
                worker.backend.fails = True
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() / 20)
        await worker.until(lambda: sum(ends.values()) == 150)
        await worker.until(lambda: not worker.service.flights)
        await worker.bus.is_responsive()
        assert set(ends.values()) == {1} and len(accepted) > 20 and not late


async def ask(
    worker: Worker, tenant: str, reply: str, request_id: str, dice: random.Random
) -> None:
    request = ChatRequest(
        messages=(ChatMessage("user", dice.choice(["hi", "long", "x" * 300 + "hi"])),),
        request_id=request_id,
        max_tokens=dice.randint(1, 60),
        timeout_s=dice.choice([None, 0.05]),
    )
    await worker.bus.publish(subjects.request(tenant), request, reply=reply)


async def test_drain_ends_the_requests_of_all_tenants(start_worker: StartWorker) -> None:
    async with start_worker(parallel=1, queue=8, step_seconds=0.001) as worker:
        tenants = [f"{worker.tenant}-{name}" for name in ("ann", "ann", "bob", "eve")]
        request = ChatRequest(messages=(ChatMessage("user", "long"),), max_tokens=50)

        async def last(tenant: str) -> object:
            return [event async for event in worker.events(request, tenant)][-1]

        asks = [asyncio.create_task(last(tenant)) for tenant in tenants]
        await worker.until(lambda: len(worker.service.flights) == 4)
    assert all(isinstance(end, Done) for end in await asyncio.gather(*asks))
