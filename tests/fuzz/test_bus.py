"""Messages of every kind on every subject of the bus. `just fuzz` runs it."""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given

from deploy.asyncapi import Channel
from tests.e2e.stack import Stack
from tests.fuzz import bus as fuzzing
from tests.fuzz.bus import ALL_CHANNELS, Sent
from tests.fuzz.conftest import Size
from tests.fuzz.health import checked_stack, ready_workers

EXAMPLES = 10  # of a channel in each round
VALID = (
    ("chat", "tenantChat", "workerChat"),
    ("tokenize", "detokenize"),
    ("embed", "rerank"),
    ("context", "messages", "import"),
)
"""Channels of each service: at least one of them gets a request that succeeds."""


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_services_survive_any_message_on_any_subject(tmp_path: Path, size: Size) -> None:
    with checked_stack(tmp_path) as stack:
        fuzz(stack, size.seconds)


def fuzz(stack: Stack, seconds: int) -> None:
    """Send messages to every channel in turn, with another seed in each round."""
    workers = ready_workers(stack)
    deadline, first = time.monotonic() + seconds, random.randrange(2**32)
    rounds = 0
    outcomes: Counter[tuple[str, str]] = Counter()
    with asyncio.Runner() as runner:
        connection = fuzzing.connect(stack)
        bus = runner.run(connection.__aenter__())

        def fuzz_channel(channel: Channel, seed: int) -> None:
            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )
            @given(fuzzing.messages(channel, workers))
            def send(sent: Sent) -> None:
                outcomes[channel.name, runner.run(fuzzing.send(bus, channel, sent))] += 1

            send()

        while time.monotonic() < deadline:
            for channel in ALL_CHANNELS:
                fuzz_channel(channel, first + rounds)
            rounds += 1
        runner.run(connection.__aexit__(None, None, None))
    print(
        f"bus: {outcomes.total()} messages in {rounds} rounds from seed {first}: {dict(outcomes)}"
    )
    for names in VALID:
        assert any(outcomes[name, "success"] for name in names), f"no valid request on {names}"
