"""llama_batch over arrays of our own, filled without a call per token."""

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np

from services.inference.engine.backend import Chunk


class LlamaBatch:
    """Of at most `size` tokens."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._slots = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        base, step = self._slots.ctypes.data, self._slots.itemsize
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slot_pointers = (pointer * size)(
            *(ctypes.cast(base + i * step, pointer) for i in range(size))
        )
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(pointer),
            embd=None,
            pos=self._positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._slot_pointers,
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, chunks: Sequence[Chunk]) -> None:
        start = 0
        self._outputs[:] = 0
        for chunk in chunks:
            end = start + len(chunk.tokens)
            self._tokens[start:end] = chunk.tokens
            self._positions[start:end] = range(chunk.position, chunk.position + end - start)
            self._slots[start:end] = chunk.slot
            self._outputs[end - 1] = chunk.sampler is not None
            start = end
        self.struct.n_tokens = start
