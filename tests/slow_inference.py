"""
services.inference with a pause for each token, so that tests can interrupt an answer.
SLOW_STEP_SECONDS makes it longer.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence

from services.inference.__main__ import serve
from services.inference.engine.backend import Chunk, SampleResult
from services.inference.engine.llama import Llama
from services.inference.settings import InferenceSettings
from services.runtime.process import run

STEP_SECONDS = float(os.environ.get("SLOW_STEP_SECONDS", "0.03"))

_decode, _verify = Llama.decode, Llama.verify


def _decode_slowly(
    self: Llama,
    chunks: Sequence[Chunk],
    meanwhile: Callable[[], object] = lambda: None,
    padding: Sequence[Chunk] = (),
) -> Sequence[SampleResult | None]:
    time.sleep(STEP_SECONDS)
    return _decode(self, chunks, meanwhile, padding)


def _verify_slowly(self: Llama, chunks: Sequence[Chunk]) -> Sequence[Iterator[SampleResult]]:
    time.sleep(STEP_SECONDS * len(chunks[0].tokens))
    return _verify(self, chunks)


if __name__ == "__main__":
    Llama.decode = _decode_slowly  # type: ignore[method-assign]
    Llama.verify = _verify_slowly  # type: ignore[method-assign]
    run("inference", InferenceSettings, serve)
