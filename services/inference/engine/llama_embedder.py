"""The Embedder protocol implemented by llama.cpp: embeddings of texts, and scores of documents."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from services.inference.engine.backend import MAX_BATCH_TOKENS, BackendError, Chunk
from services.inference.engine.embedding import MAX_BATCH_INPUTS, Rows, Tokens
from services.inference.engine.llama_batch import LlamaBatch
from services.inference.engine.llama_model import (
    LOG,
    LlamaModel,
    ModelError,
)
from services.inference.engine.prompt.tokenizer import Tokenizer

PROBABILITIES = ("qwen3", "qwen3vl")
"""Architectures whose rerankers end in a softmax over "yes" and "no" (llama-graph.cpp)."""
PLACEHOLDER = re.compile(r"(\{query\}|\{document\})")
PROBE = "a"


class LlamaEmbedder(LlamaModel):
    """
    An embedding model or a reranker, with a context of `context` tokens per input. The file says
    how the states of an input's tokens are pooled. Raises ModelError.
    """

    def __init__(
        self,
        parts: Path | Sequence[Path],
        *,
        context: int,
        threads: int,
        gpu_layers: int,
        on_progress: Callable[[float], bool],
        tensor_split: Sequence[float] = (),
        main_gpu: int | None = None,
    ) -> None:
        super().__init__(parts, gpu_layers, on_progress, tensor_split, main_gpu)
        self.context = self.usable_context(context)
        self._is_probability = self.metadata("general.architecture") in PROBABILITIES
        try:
            self._context = self._open_context(threads)
        except ModelError:
            self.free_model()
            raise
        self._pooling = llama_cpp.llama_pooling_type(self._context)
        self.width = (
            llama_cpp.llama_model_n_cls_out(self._model)
            if self.is_reranker
            else llama_cpp.llama_model_n_embd_out(self._model)
        )
        if why_not := self._why_unusable():
            self.close()
            raise ModelError(why_not)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._max_step = int(llama_cpp.llama_n_batch(self._context))
        self._batch = LlamaBatch(self._max_step)
        template = llama_cpp.llama_model_chat_template(self._model, b"rerank")
        self._template = template.decode(errors="replace") if template else None
        self._tokenizer = Tokenizer(self, self._template or "")
        self._before, self._after = self._special_tokens_around()

    @property
    def is_reranker(self) -> bool:
        return bool(self._pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK)

    def tokenize_input(self, text: str) -> list[int]:
        return [*self._before, *self._tokenizer.tokenize(text, special=False), *self._after]

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        """
        Use the file's template `rerank`, or the separators of a cross-encoder, as llama-server does
        (`format_prompt_rerank` in tools/server/server-common.cpp). No text becomes a control token.
        """
        if self._template is not None:
            return self._fill_in(self._template, {"{query}": query, "{document}": document})
        vocab = self._vocab
        eos = llama_cpp.llama_vocab_eos(vocab)
        end = llama_cpp.llama_vocab_sep(vocab) if eos < 0 else eos
        ends = [end] if llama_cpp.llama_vocab_get_add_eos(vocab) else []
        separators = [llama_cpp.llama_vocab_sep(vocab)]
        return [
            *([llama_cpp.llama_vocab_bos(vocab)] if self.adds_bos else []),
            *self._tokenizer.tokenize(query, special=False),
            *ends,
            *(separators if llama_cpp.llama_vocab_get_add_sep(vocab) else []),
            *self._tokenizer.tokenize(document, special=False),
            *ends,
        ]

    def embed(self, inputs: Sequence[Tokens]) -> Rows:
        if self._memory:
            llama_cpp.llama_memory_clear(self._memory, False)
        if len(inputs) == 1:
            tokens = inputs[0]
            for start in range(0, len(tokens), self._max_step):
                self._compute([Chunk(0, start, tokens[start : start + self._max_step], None)])
        else:
            self._compute([Chunk(slot, 0, tokens, None) for slot, tokens in enumerate(inputs)])
        return np.stack([self._row(slot) for slot in range(len(inputs))])

    def relevance(self, rows: Rows) -> list[float]:
        scores = rows[:, 0].astype(np.float64)
        if not self._is_probability:
            scores = 1 / (1 + np.exp(-scores))
        return [float(score) for score in scores]

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        self.free_model()

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        LOG.errors.clear()
        self._batch.fill(chunks, is_all_output=True)
        compute = llama_cpp.llama_decode if self._memory else llama_cpp.llama_encode
        if result := compute(self._context, self._batch.struct):
            raise BackendError(f"llama.cpp failed with {result} ({LOG.reason}).")

    def _row(self, slot: int) -> Rows:
        pointer = llama_cpp.llama_get_embeddings_seq(self._context, slot)
        if not pointer:
            raise BackendError("llama.cpp returned no embedding.")
        return np.ctypeslib.as_array(pointer, (self.width,)).copy()

    def _why_unusable(self) -> str | None:
        if self._pooling == llama_cpp.LLAMA_POOLING_TYPE_NONE:
            return (
                "The model's file does not say how to pool the embeddings of its tokens"
                " (pooling_type). Convert it again, with the folder 1_Pooling of the original."
            )
        if self.is_reranker and not self._is_probability and self.width != 1:
            return (
                f"The model is a classifier with {self.width} outputs. Only rerankers, with one"
                " output, are supported."
            )
        return None

    def _special_tokens_around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that llama.cpp puts before and after a text."""
        plain = self.tokenize(PROBE, special=False)
        whole = self._tokenize(PROBE.encode(), special=False, add_special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        raise AssertionError("llama.cpp only adds tokens before and after those of a text")

    def _fill_in(self, template: str, texts: dict[str, str]) -> list[int]:
        """
        Replace the placeholders. The prompt is tokenized as a whole, as in training, unless one of
        the texts has the name of a control token: then text by text.
        """
        parts = PLACEHOLDER.split(template)
        if not any(map(self._tokenizer.names_reserved, texts.values())):
            whole = "".join(texts.get(part, part) for part in parts)
            return self._tokenizer.tokenize(whole, special=True)
        tokens: list[int] = []
        for part in parts:
            if part in texts:
                self._tokenizer.append_content(tokens, texts[part])
            else:
                self._tokenizer.append(tokens, part, special=True)
        return tokens

    def _open_context(self, threads: int) -> llama_cpp.llama_context_p:
        params = embedding_params(self._model, self.context, threads)
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(
                f"The memory for texts of {self.context} tokens can't be allocated ({LOG.reason})."
                " If there is not enough memory, lower MODEL_CONTEXT."
            )
        return llama_cpp.llama_context_p(context)


def embedding_params(
    model: llama_cpp.llama_model_p, context: int, threads: int
) -> llama_cpp.llama_context_params:
    """
    Return the parameters of a context for inputs of up to `context` tokens. A step computes the
    logits of all its tokens, too, so its memory grows with them: inputs are split where possible.
    """
    params: llama_cpp.llama_context_params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = MAX_BATCH_TOKENS
    params.n_seq_max = MAX_BATCH_INPUTS
    params.n_threads = params.n_threads_batch = threads
    params.embeddings = True
    params.kv_unified = True  # all sequences of a batch share the cells
    if not llama_cpp.llama_supports_gpu_offload():
        # On a CPU it rounds to 16 bits, differently in each batch: values would differ by 0.1 %.
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    can_split = _can_split_inputs(model, params)
    # llama.cpp plans for a multiple of the sequences, and aborts if it pools others (MEAN)
    per_sequence = -(-max(context, MAX_BATCH_TOKENS) // MAX_BATCH_INPUTS)
    params.n_ctx = per_sequence * MAX_BATCH_INPUTS
    if not can_split:
        params.n_batch = params.n_ubatch = params.n_ctx
    return params


def _can_split_inputs(
    model: llama_cpp.llama_model_p, params: llama_cpp.llama_context_params
) -> bool:
    """
    Return whether an input may be computed in several steps: each token sees only those before it,
    and the last one counts (`can_split` in tools/server/server-context.cpp). A context knows it.
    """
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return False  # the larger context will fail, too, with the reason
    is_last = llama_cpp.llama_pooling_type(context) in (
        llama_cpp.LLAMA_POOLING_TYPE_LAST,
        llama_cpp.LLAMA_POOLING_TYPE_RANK,
    )
    is_causal = llama_cpp.llama_get_memory(context) and llama_cpp.llama_get_causal_attn(context)
    llama_cpp.llama_free(context)
    return bool(is_last and is_causal)
