"""
Measure constrained decoding: compiling a grammar, masking all tokens, checking one token.

`python -m bench.masks [GGUF …]` accepts models or vocabularies; the default is the demo model.
"""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
from llama_cpp.llama_grammar import JSON_GBNF

from services.contract.messages import JsonObjectFormat, JsonSchema, JsonSchemaFormat, Sampling
from services.inference.engine.llama import Llama
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.grammar import Grammar, Vocabulary

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "ages": {"type": "array", "items": {"type": "integer"}},
        "city": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "ages", "city", "kind"],
    "additionalProperties": False,
}
PRODUCT: dict[str, Any] = {
    "type": "object",
    "properties": {"product": {"enum": [f"PROD-2024-{number:05d}" for number in range(300)]}},
    "required": ["product"],
    "additionalProperties": False,
}
ADA = {
    "name": "Ada Lovelace of London, with a rather long description",
    "ages": [1, 23, 456],
    "city": 'Zürich "old" town',
    "kind": "green",
}


class Case(NamedTuple):
    name: str
    sampling: Sampling
    answer: Any


def _schema(schema: dict[str, Any]) -> Sampling:
    return Sampling(response_format=JsonSchemaFormat(JsonSchema(schema)))


CASES = (
    Case("schema of a person", _schema(PERSON), ADA),
    Case("json_object", Sampling(response_format=JsonObjectFormat()), ADA),
    Case("enum of 300", _schema(PRODUCT), {"product": "PROD-2024-00123"}),
    Case("JSON as GBNF", Sampling(grammar=JSON_GBNF), ADA),
)


class VocabularyOnly(Llama):
    """A model's tokenizer without its weights."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"{path} can't be loaded"
        self._model = llama_cpp.llama_model_p(model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = self._read_vocabulary()

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary


def measure(model: VocabularyOnly, case: Case) -> str:
    """Return a table row in milliseconds: compiling, masks, and the check of one token."""
    began = time.perf_counter()
    grammar = constraints.compile_grammar(case.sampling, None, model.vocabulary)
    compiled = time.perf_counter() - began
    assert grammar is not None
    tokens = _tokenize(model, json.dumps(case.answer, ensure_ascii=False))
    times = list(_times(grammar, tokens))
    masks, checks = sorted(mask for mask, _ in times), [check for _, check in times]
    cells = (
        compiled,
        statistics.median(masks),
        masks[int(0.9 * len(masks))],
        masks[-1],
        statistics.median(checks),
    )
    return " | ".join((case.name, *(f"{1000 * cell:.3f}" for cell in cells)))


def _tokenize(model: VocabularyOnly, text: str) -> list[int]:
    """Tokenize JSON without the leading space that some tokenizers add, which no grammar allows."""
    tokens = model.tokenize(text, special=False)
    first = model.piece(tokens[0]).lstrip()
    return [model.vocabulary.pieces.index(first), *tokens[1:]] if first else tokens[1:]


def _times(grammar: Grammar, tokens: list[int]) -> Iterator[tuple[float, float]]:
    """Yield, for each token, the seconds to compute the mask and to check the token."""
    for token in tokens:
        began = time.perf_counter()
        mask = grammar.allowed()
        masked = time.perf_counter()
        assert grammar.allows(token) and mask[token]
        yield masked - began, time.perf_counter() - masked
        grammar.accept(token)


def main(paths: list[str]) -> None:
    for path in paths or ["model/demo.gguf"]:
        model = VocabularyOnly(Path(path))
        began = time.perf_counter()
        Vocabulary(model.vocabulary.pieces, model.vocabulary.ends)
        built = time.perf_counter() - began
        print(f"\n{path}: {model.vocabulary_size:,} tokens, llguidance's trie in {built:.2f} s\n")
        print("case | compile ms | mask median | 90 % | max | token check")
        print("--- | --- | --- | --- | --- | ---")
        for case in CASES:
            print(measure(model, case))


_SILENT = llama_cpp.llama_log_callback(lambda *_: None)

if __name__ == "__main__":
    main(sys.argv[1:])
