"""
Conversations with models whose state can't be cut: small ones with random weights. A reused prefix
saves prefill, and leaves every answer as it is without one.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from bench.hybrid_models import ARCHITECTURES, TINY, write
from services.contract.messages import Sampling
from services.inference.engine.backend import Chunk, SampledToken
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.engine.demo import clear_slots, open_demo

PARALLEL = SPARE = 3  # slots of the engine, and one to compare them with
CONTEXT = 2048
ANSWER = 24  # tokens
HOST_CACHE = 2**26
MAX_NEW = 100  # tokens that a next turn prefills at most: an answer, a question, their headers
MAX_ROUNDING = 0.005  # of a logit: the order of sums changes 0.001, a lost token 0.05
SEEDED = Sampling(temperature=2.0, top_k=0, max_tokens=ANSWER, seed=7)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def llama(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Llama]:
    """
    A model of each kind. Gemma's weights are in F32: a copy of a window has its cells in another
    order, and rounding to Q8_0 would enlarge what that changes in a sum.
    """
    kind = "F32" if request.param == "gemma3" else "Q8_0"
    yield from opened(request.param, kind, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def precise(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Llama]:
    """A model of each kind with weights in F32: batches of any size have nearly equal logits."""
    yield from opened(request.param, "F32", tmp_path_factory.mktemp("models"))


def opened(name: str, kind: str, folder: Path) -> Iterator[Llama]:
    shape = TINY._replace(kind=GGMLQuantizationType[kind])
    path = write(name, shape, folder / f"{name}.gguf")
    llama = open_demo(path, context=CONTEXT, parallel=PARALLEL + 1)
    yield llama
    llama.close()


class Answered(NamedTuple):
    tokens: list[int]  # without a stop string
    cached: int
    prefilled: int


class Chat:
    """An engine that is stepped in this thread, with prompts in ChatML."""

    def __init__(
        self, llama: Llama, host_cache: int = HOST_CACHE, public: tuple[list[int], ...] = ()
    ) -> None:
        clear_slots(llama, PARALLEL + 1)
        self.llama = llama
        self._outputs: list[tuple[str, Output]] = []
        self._count = 0
        self.engine = Engine(llama, PARALLEL, host_cache, self._outputs.extend, pytest.fail, public)

    def message(self, role: str, content: str | list[int]) -> list[int]:
        """Return the tokens of a message; an answer's are given."""
        text = content if isinstance(content, list) else self.llama.tokenize(content, False)
        start = self.llama.tokenize(f"<|im_start|>{role}\n", True)
        return [*start, *text, *self.llama.tokenize("<|im_end|>\n", True)]

    def sequence(
        self,
        history: list[int],
        session: str = "",
        opening: str = "",
        stop: tuple[str, ...] = (),
        is_deterministic: bool = True,
        tenant: str = "",
        resumed: tuple[int, ...] = (),
    ) -> Sequence:
        """Return a sequence; `opening` is what the prompt begins the answer with."""
        self._count += 1
        prompt = [*history, *self.llama.tokenize(f"<|im_start|>assistant\n{opening}", True)]
        sampler = self.llama.sampler(SEEDED)
        answer = GeneratedAnswer(AnswerLimits(ANSWER), StopRules.literal(stop))
        for token in resumed:
            accepted = sampler.accept(token)
            assert isinstance(accepted, SampledToken)
            answer.push(accepted, self.llama.piece(token), is_end=False)
        return Sequence(
            f"{self._count}",
            prompt,
            SEEDED,
            sampler,
            answer,
            session=session,
            is_deterministic=is_deterministic,
            tenant=tenant,
            stable_length=len(history) - 2,
        )

    def run(self, *sequences: Sequence) -> list[Answered]:
        for sequence in sequences:
            self.engine.submit(sequence)
        while sum(isinstance(output, Finished) for _, output in self._outputs) < len(sequences):
            self.engine.step()
        self._outputs.clear()
        self.engine._scheduler.check_invariants()
        return [
            Answered(s.generated, s.cached_tokens, len(s.prefill_tokens) - s.cached_tokens)
            for s in sequences
        ]

    def ask(self, history: list[int], session: str = "", **more: object) -> Answered:
        (answered,) = self.run(self.sequence(history, session, **more))  # type: ignore[arg-type]
        return answered

    def cold(self, history: list[int], opening: str = "") -> list[int]:
        """Return the answer of an engine with nothing cached. Empties this one's slots."""
        return Chat(self.llama).ask(history, opening=opening).tokens

    def check(self, history: list[int], answered: Answered, opening: str = "") -> None:
        """Check that an answer, the last thing that the slots are used for, is as a cold one."""
        self.check_slots(0 if self.llama.is_reuse_exact else MAX_ROUNDING)
        if self.llama.is_reuse_exact:
            assert answered.tokens == self.cold(history, opening)

    def check_slots(self, max_difference: float) -> None:
        """Check that what follows each slot's tokens is as if they were computed anew."""
        self.engine._scheduler.check_invariants()
        for number, slot in enumerate(self.engine._slots._slots):
            tokens = np.frombuffer(slot.key[prefix.HEADER_BYTES :], np.int32).tolist()
            assert self.llama.restore(SPARE, self.llama.save(number))
            cached = self._logits([*tokens, 300], len(tokens))
            self.llama.truncate(SPARE, 0)
            difference = np.abs(cached - self._logits([*tokens, 300], 0)).max()
            assert difference <= max_difference

    def _logits(self, tokens: list[int], start: int) -> npt.NDArray[np.float32]:
        sampler = self.llama.sampler(SEEDED)
        for at in range(start, len(tokens), 63):
            self.llama.decode([Chunk(SPARE, at, tokens[at : at + 63], sampler)])
        return np.array(self.llama._logits(1)[0])


def words(count: int, seed: int = 1) -> str:
    letters = random.Random(seed)
    return "".join(" " + "".join(letters.choices("abcdefgh", k=2)) for _ in range(count))


def test_next_turn_prefills_only_what_is_new(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    for turn in range(4):
        answered = chat.ask(history, "s")
        assert turn == 0 or answered.prefilled <= MAX_NEW
        history += chat.message("assistant", answered.tokens) + chat.message("user", f" go {turn}")
    chat.check(history, chat.ask(history, "s"))


def test_next_turn_without_the_old_thought_reuses_the_question(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    for turn in range(3):
        thought = chat.ask(history, "s", opening="<think>\n").tokens
        history += chat.message("assistant", thought[-4:]) + chat.message("user", f" go {turn}")
        answered = chat.ask(history, "s", opening="<think>\n")
        assert answered.prefilled <= MAX_NEW
    chat.check(history, answered, opening="<think>\n")


def test_retry_reuses_the_prompt(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    first = chat.ask(history, "s")
    again = chat.ask(history, "s")
    assert again.prefilled <= MAX_NEW
    assert again.tokens == first.tokens or not llama.is_reuse_exact
    chat.check(history, again)


def test_tokens_behind_a_stop_string_are_not_reused(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    full = chat.ask(history, "probe").tokens
    pieces = [llama.piece(token) for token in full]
    start = next(i for i in range(8, ANSWER) if b"".join(pieces[i : i + 3]).isascii())
    stop = b"".join(pieces[start : start + 3]).decode()
    assert len(chat.ask(history, "s", stop=(stop,)).tokens) < ANSWER
    history += chat.message("assistant", full[:start]) + chat.message("user", " go on")
    answered = chat.ask(history, "s")
    assert answered.prefilled <= MAX_NEW
    chat.check(history, answered)


def test_sessions_beyond_the_slots_keep_their_checkpoints(llama: Llama) -> None:
    chat = Chat(llama)
    sessions = {f"s{i}": chat.message("user", words(500, seed=i)) for i in range(PARALLEL + 2)}
    for turn in range(3):
        asked = [chat.sequence(history, name) for name, history in sessions.items()]
        for (name, history), answered in zip(sessions.items(), chat.run(*asked), strict=True):
            assert turn == 0 or answered.prefilled <= MAX_NEW
            shown = answered.tokens[:-6]  # the thought at its end is dropped
            sessions[name] = [
                *history,
                *chat.message("assistant", shown),
                *chat.message("user", f" go {turn}"),
            ]
    chat.check(sessions["s0"], chat.ask(sessions["s0"], "s0"))


@pytest.mark.parametrize("public", [True, False])
def test_new_sessions_share_a_system_prompt(llama: Llama, public: bool) -> None:
    probe = Chat(llama)
    system = probe.message("system", words(400, seed=9))
    chat = Chat(llama, public=(system,) if public else ())
    questions = [[*system, *chat.message("user", words(20, seed=i))] for i in range(5)]
    cached = [chat.ask(question, f"s{i}").cached for i, question in enumerate(questions)]
    # where a slot is taken over, it may share the first words of the question, too
    if public:
        assert cached[0] == 0
        assert all(len(system) <= each <= len(system) + 16 for each in cached[1:])
    else:  # the second prompt shows what sessions share
        assert all(abs(each - len(system)) <= 16 for each in cached[2:])
    chat.check(questions[1], chat.ask(questions[1], "new"))


def test_sessions_that_arrive_together_share_one_prefill(llama: Llama) -> None:
    chat = Chat(llama)
    system = chat.message("system", words(400, seed=9))
    questions = [[*system, *chat.message("user", words(20, seed=i))] for i in range(PARALLEL)]
    asked = [chat.sequence(question, f"s{i}") for i, question in enumerate(questions)]
    answers = chat.run(*asked)
    assert sum(each.cached >= len(system) - 16 for each in answers) == PARALLEL - 1
    chat.check(questions[1], answers[1])


def test_tenants_share_public_prefixes_only(llama: Llama) -> None:
    probe = Chat(llama)
    system = probe.message("system", words(100, seed=9))
    chat = Chat(llama, public=(system,))
    question = [*system, *chat.message("user", words(200))]
    chat.ask(question, "s", tenant="a")
    chat.ask([*question[:-50], *chat.message("user", "x")], "t", tenant="a")
    assert chat.ask(question, "s", tenant="b").cached == len(system)
    # a tenant's prompt that leaves the public prefix in its middle makes no checkpoint for others
    chat = Chat(llama, public=(system,))
    chat.ask([*system[:60], *chat.message("user", words(100))], "s", tenant="a")
    assert chat.ask(question, "s", tenant="b").cached == 0


def test_resumed_answer_is_reused_by_the_next_turn(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    full = chat.ask(history).tokens
    chat = Chat(llama)
    chat.run(chat.sequence(history, "s", resumed=tuple(full[:10])))
    again = chat.ask(history, "s")
    assert again.prefilled <= MAX_NEW
    chat.check(history, again)


def test_idle_prefill_continues_at_a_checkpoint(llama: Llama) -> None:
    chat = Chat(llama)
    history = chat.message("user", words(900))
    thinking = chat.sequence(history, "s", opening="<think>\n", is_deterministic=False)
    (answered,) = chat.run(thinking)
    answer = answered.tokens
    known = [*history, *chat.message("assistant", answer[-5:])]
    chat.engine._handle(IdlePrompt(known, 0, "s"))
    computed = chat.engine._idle_prefill
    steps = 0
    while computed.step(32):
        steps += 1
    assert steps <= 2
    answered = chat.ask([*known, *chat.message("user", " go")], "s", is_deterministic=False)
    assert answered.cached >= len(known)


def test_no_checkpoint_without_a_host_cache(llama: Llama) -> None:
    chat = Chat(llama, host_cache=0)
    history = chat.message("user", words(900))
    first = chat.ask(history, "s")
    history += chat.message("assistant", first.tokens) + chat.message("user", " go")
    assert chat.ask(history, "s").prefilled <= MAX_NEW  # the whole sequence is continued
    chat.check(history, chat.ask(history, "s"))


@pytest.mark.parametrize("seed", range(2))
def test_state_is_that_of_the_tokens_after_random_requests(precise: Llama, seed: int) -> None:
    chance = random.Random(seed)
    system = Chat(precise).message("system", words(60, seed=9))
    host_cache = chance.choice([2**19, 2**21, HOST_CACHE])
    chat = Chat(precise, host_cache, public=(system,))
    sessions: dict[str, list[int]] = {}
    saved = 0
    for _ in range(12):
        names = chance.sample("abcdef", chance.randint(1, 5))
        for name in names:
            history = sessions.setdefault(name, [*system])
            if len(history) > 1200 or chance.random() < 0.1:  # the window moves on
                history[:] = system
            if chance.random() < 0.2:  # edited from here on
                del history[chance.randint(len(system), len(history)) :]
            history += chat.message("user", words(chance.randint(1, 120), chance.randint(0, 9)))
        sequences = [
            chat.sequence(
                sessions[name],
                name,
                stop=chance.choice([(), ("a", "b")]),
                is_deterministic=chance.random() < 0.5,
                tenant=chance.choice(["x", name]),
            )
            for name in names
        ]
        for name, answered in zip(names, chat.run(*sequences), strict=True):
            saved += answered.cached
            shown = answered.tokens[chance.randint(0, len(answered.tokens)) :]
            sessions[name] += chat.message("assistant", shown)
        while chance.random() < 0.7 and chat.engine._idle_step():
            pass
        chat.check_slots(MAX_ROUNDING)
    assert saved > 1000
