"""One request inside the engine: its tokens, how far they are computed, and its answer."""

import time
from dataclasses import InitVar, dataclass, field

from services.contract.messages import Sampling, Timings, Usage
from services.inference.engine.backend import Sampler
from services.inference.engine.kv_cache import prefix
from services.inference.engine.output.answer import GeneratedText

# Tokens that are read at once where it must be exact. llama.cpp computes a single one, and by flash
# attention more than these, in other ways, whose logits differ by a tenth.
LEAST_EXACT, MOST_EXACT = 2, 63


def owner(adapter: int, session: str) -> str:
    """Of what was computed: a session has something else with each adapter; "" is nobody."""
    return f"{adapter}.{session}" if session else ""


@dataclass(slots=True, eq=False)
class Sequence:
    """
    Facts only; what follows from them is a property.

    The engine's thread owns it once it is submitted; others may read its counts.
    """

    key: str  # of the request, unique among those in the engine
    prompt: list[int]
    sampling: Sampling  # filled in: max_tokens and stop are set
    sampler: Sampler  # closed by the engine
    adapter: int = 0  # 0: the model as it is
    session: str = ""  # whose conversation it is; "" is nobody's
    is_exact: bool = False  # read so that its logits are the same each time
    begun: InitVar[GeneratedText | None] = (
        None  # maybe by another worker; None: a new answer with literal stops
    )
    tenant: str = prefix.PUBLIC  # whose text the prompt contains
    answer: GeneratedText = field(init=False)
    given: list[int] = field(init=False)  # the prompt, and what was said elsewhere: read first
    run: bytes = field(init=False)  # what of this can be reused: all but the last token
    computed: int = 0  # tokens, from the first on, that the KV cache holds
    cached: int = 0  # of these, how many it held before the request came
    place: int = 0  # in the queue, 1 is next; 0: not in it
    found: int = 0  # tokens that the KV cache held of it when the queue was last put in order
    slot: int | None = None
    received: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    last_sent: float = 0.0

    def __post_init__(self, begun: GeneratedText | None) -> None:
        self.answer = begun or GeneratedText(self.sampling)
        self.given = [*self.prompt, *self.answer.tokens]
        # the last token's logits are needed, so it is always computed
        computed_anew = LEAST_EXACT if self.is_exact else 1
        reused = self.given[:-computed_anew]
        self.run = prefix.pack(self.adapter, reused, self.is_exact, self.tenant)

    @property
    def owner(self) -> str:
        return owner(self.adapter, self.session)

    @property
    def generated(self) -> list[int]:
        return self.answer.tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_prefilled(self) -> bool:
        """Whether all but the newest token is computed: a decode step is next."""
        return self.length - 1 == self.computed >= len(self.given)

    @property
    def unread(self) -> int:
        """Tokens that are to be computed before the next one is chosen for the first time."""
        return max(0, len(self.given) - self.computed)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return (self.sampling.max_tokens or 0) - len(self.generated)

    def next_tokens(self, most: int) -> list[int]:
        """The next tokens to compute, at most `most`."""
        if self.is_prefilled:
            return self.generated[-1:]
        if self.is_exact:
            most = min(most, MOST_EXACT)
            most -= 0 < self.unread - most < LEAST_EXACT
        return self.given[self.computed : self.computed + most]

    @property
    def usage(self) -> Usage:
        """Of what was cached, only the prompt's is counted."""
        prompt = len(self.prompt)
        return Usage(prompt, len(self.generated), min(prompt, self.cached))

    @property
    def timings(self) -> Timings:
        """Phases that were not reached are 0."""
        queued = (self.started or time.monotonic()) - self.received
        prefill = self.first_token - self.started if self.first_token else 0.0
        decode = self.last_token - self.first_token
        return Timings(round(queued, 6), round(prefill, 6), round(decode, 6))
