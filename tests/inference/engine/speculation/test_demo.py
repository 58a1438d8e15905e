"""Speculative decoding with the demo model, whose logits depend on the size of a step."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from services.contract.messages import Sampling
from services.inference.engine.backend import Chunk, SampledToken
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.engine.demo import clear_slots, open_demo

ALWAYS = replace(  # whatever the steps cost
    DEFAULT_LIMITS, min_speculation_gain=0, max_slowdown=1e9
)
NEVER = replace(DEFAULT_LIMITS, max_speculating_streams=0)
PARALLEL = 4
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    llama = open_demo(parallel=PARALLEL)
    yield llama
    llama.close()


def prompt(llama: Llama, text: str) -> list[int]:
    user = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return llama.tokenize(user, special=True)


def generate(llama: Llama, limits: SchedulerLimits, *prompts: list[int]) -> list[Sequence]:
    """Return the answered sequences, greedy ones of at most 60 tokens, generated at once."""
    clear_slots(llama, PARALLEL)
    outputs: list[tuple[str, Output]] = []
    engine = Engine(llama, PARALLEL, 2**24, outputs.extend, pytest.fail, limits=limits)
    greedy = Sampling(temperature=0, max_tokens=60)
    sequences = []
    for number, tokens in enumerate(prompts):
        answer = GeneratedAnswer(AnswerLimits(60), StopRules())
        sequence = Sequence(f"{number}", tokens, greedy, llama.sampler(greedy), answer)
        engine.submit(sequence)
        sequences.append(sequence)
    while sum(isinstance(output, Finished) for _, output in outputs) < len(prompts):
        engine.step()
    engine._scheduler.check_invariants()
    return sequences


def test_greedy_answer_that_repeats_is_as_without_drafts(llama: Llama) -> None:
    asked = prompt(llama, QUESTION)
    (plain,) = generate(llama, NEVER, asked)
    # the answer is in the prompt, and the model gives it again
    again = [*asked, *plain.generated, *llama.tokenize("\n", special=True), *asked]
    (without,), (drafted,) = (generate(llama, limits, again) for limits in (NEVER, ALWAYS))
    assert drafted.generated == without.generated
    assert drafted.accepted_tokens and without.drafted_tokens == 0


def test_greedy_answers_at_once_are_as_without_drafts(llama: Llama) -> None:
    texts = (QUESTION, "Who are you?", "Tell me a joke.")
    prompts = [[*prompt(llama, text), *prompt(llama, text)] for text in texts]
    plain = generate(llama, NEVER, *prompts)
    drafted = generate(llama, ALWAYS, *prompts)
    assert [each.generated for each in drafted] == [each.generated for each in plain]
    assert sum(each.drafted_tokens for each in drafted) > 0


def test_verification_samples_what_single_steps_sample(llama: Llama) -> None:
    clear_slots(llama, PARALLEL)
    tokens = prompt(llama, QUESTION)
    samplers = [llama.sampler(Sampling(temperature=0)) for _ in range(2)]
    expected: list[int] = []
    for _ in range(6):
        start = llama.length(0)
        new = [*tokens, *expected][start:]
        (sampled,) = llama.decode([Chunk(0, start, new, samplers[0])])
        assert isinstance(sampled, SampledToken)
        expected.append(sampled.token)
    llama.decode([Chunk(1, 0, tokens[:-1], None)])
    draft = [*expected[:3], expected[3] + 1]
    (choices,) = llama.verify([Chunk(1, len(tokens) - 1, [tokens[-1], *draft], samplers[1])])
    assert [next(choices) for _ in range(4)] == [SampledToken(each) for each in expected[:4]]
    llama.truncate(1, len(tokens) + 3)
    (sampled,) = llama.decode([Chunk(1, len(tokens) + 3, [expected[3]], samplers[1])])
    assert sampled == SampledToken(expected[4])
