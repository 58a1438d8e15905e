"""
One request inside the engine: its tokens, how far they are computed, and the text that came of
them.
"""

import time
from dataclasses import dataclass, field

from services.contract.messages import Sampling, Timings, Usage
from services.inference.engine import runs
from services.inference.engine.backend import Chosen, Sampler
from services.inference.engine.detokenizer import Detokenizer
from services.inference.engine.loops import LoopGuard
from services.inference.engine.stops import StopBuffer


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
    run: bytes = field(init=False)  # what of the prompt can be reused: all but its last token
    generated: list[int] = field(default_factory=list)
    computed: int = 0  # tokens, from the first on, that the KV cache holds
    cached: int = 0  # of these, how many it held before the request came
    place: int = 0  # in the queue, 1 is next; 0: not in it
    found: int = 0  # tokens that the KV cache held of it when the queue was last put in order
    slot: int | None = None
    received: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    detokenizer: Detokenizer = field(default_factory=Detokenizer)
    stops: StopBuffer = field(init=False)
    loops: LoopGuard = field(default_factory=LoopGuard)
    last_sent: float = 0.0
    unsent: list[Chosen] = field(default_factory=list)  # tokens whose text was not sent yet
    unsent_text: str = ""  # of them, what is no beginning of a stop string
    sent_chars: int = 0

    def __post_init__(self) -> None:
        self.stops = StopBuffer(self.sampling.stop or ())
        # the last token's logits are needed, so it is always computed
        self.run = runs.pack(self.adapter, self.prompt[:-1])

    @property
    def owner(self) -> str:
        """Of what was computed: a session has something else with each adapter."""
        return f"{self.adapter}.{self.session}" if self.session else ""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_prefilled(self) -> bool:
        """Whether all but the newest token is computed: a decode step is next."""
        return self.computed == self.length - 1 and bool(self.generated)

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are to be computed."""
        return max(0, len(self.prompt) - self.computed)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return (self.sampling.max_tokens or 0) - len(self.generated)

    def next_tokens(self, most: int) -> list[int]:
        """The next tokens to compute, at most `most`."""
        if self.is_prefilled:
            return self.generated[-1:]
        return self.prompt[self.computed : self.computed + most]

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.generated), self.cached)

    @property
    def timings(self) -> Timings:
        """Phases that were not reached are 0."""
        queued = (self.started or time.monotonic()) - self.received
        prefill = self.first_token - self.started if self.first_token else 0.0
        decode = self.last_token - self.first_token
        return Timings(round(queued, 6), round(prefill, 6), round(decode, 6))
