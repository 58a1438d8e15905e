"""llama.cpp's batches: the tokens that one call computes."""

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np

from services.inference.engine.backend import Chunk


class LlamaBatch:
    """
    A llama_batch of at most `size` tokens over numpy arrays, filled per chunk instead of per token.
    """

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._slot_counts = np.ones(size, np.int32)
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
            n_seq_id=self._slot_counts.ctypes.data_as(pointer),
            seq_id=self._slot_pointers,
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, chunks: Sequence[Chunk], is_all_output: bool = False) -> None:
        """Fill it; the last token of each chunk is output if the chunk has a sampler."""
        start = 0
        self._outputs[:] = is_all_output
        for chunk in chunks:
            end = start + len(chunk.tokens)
            self._tokens[start:end] = chunk.tokens
            self._positions[start:end] = range(chunk.position, chunk.position + end - start)
            self._slots[start:end] = chunk.slot
            self._outputs[end - 1] |= chunk.sampler is not None
            start = end
        self.struct.n_tokens = start
