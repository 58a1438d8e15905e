"""Grammars on the demo model's vocabulary, compared with llama.cpp's own grammar sampler."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp.llama_grammar import ARITHMETIC_GBNF, C_GBNF, JSON_GBNF

from services.contract.messages import (
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Sampling,
)
from services.inference.engine.backend import Chunk, ConstraintFailure, SampledToken
from services.inference.engine.llama import Llama
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.candidates import Candidates
from services.inference.engine.sampling.gbnf import to_lark
from services.inference.engine.sampling.grammar import GrammarError, Vocabulary, compile_lark
from services.inference.engine.sampling.sampler import SamplerChain
from tests.inference.engine.demo import open_demo
from tests.inference.fake_backend import VOCABULARY
from tests.inference.grammars import accepts

WIDE = "".join(chr(0x4E00 + 2 * i) for i in range(2_000))  # no two of them are one range
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "color": {"enum": ["red", "grün", 'a\\b "c"\n']},
        "lives": {
            "type": "object",
            "properties": {"floor": {"type": "integer"}, "warm": {"type": "boolean"}},
            "required": ["floor"],
        },
        "tags": {"type": "array", "items": {"const": "x"}, "maxItems": 2},
    },
    "required": ["name", "color", "lives"],
}


@pytest.fixture(scope="module")
def demo_model() -> Iterator[Llama]:
    llama = open_demo(parallel=1)
    yield llama
    llama.close()


def generate(demo_model: Llama, length: int = 400, **sampling: Any) -> tuple[str, bool]:
    """Return an answer with a grammar, and whether it ended within `length` tokens."""
    sampler = demo_model.sampler(Sampling(**sampling))
    demo_model.truncate(0, 0)
    text = b""
    tokens, position = demo_model.tokenize("<|im_start|>user\n", special=True), 0
    is_last = False
    while position + len(tokens) < length and not is_last:
        (chosen,) = demo_model.decode([Chunk(0, position, tokens, sampler)])
        assert isinstance(chosen, SampledToken)
        position += len(tokens)
        tokens = [chosen.token]
        text += demo_model.piece(chosen.token)
        is_last = chosen.is_last or demo_model.is_end(chosen.token)
    sampler.close()
    return text.decode(errors="replace"), is_last


def matches(rules: str, text: str) -> bool:
    """Return whether the text matches the GBNF rules."""
    return accepts(to_lark(rules), text)


def test_json_object_is_json_at_high_temperature(demo_model: Llama) -> None:
    """The demo model knows no JSON: a bias makes the ends of strings and objects likelier."""
    ends = {str(token): 9.0 for text in ('"', "}") for token in demo_model.tokenize(text, False)}
    form = JsonObjectFormat()
    answers = [
        generate(demo_model, temperature=1.5, seed=seed, response_format=form, logit_bias=ends)
        for seed in range(12)
    ]
    whole = [json.loads(text) for text, ended in answers if ended]
    assert len(whole) > 8 and all(isinstance(value, dict) for value in whole)
    assert any(whole) and all(text.startswith("{") for text, _ in answers)


def test_schema_holds_for_sampled_answers(demo_model: Llama) -> None:
    form = JsonSchemaFormat(JsonSchema(PERSON, "person"))
    ended = 0
    for seed in range(12):
        text, is_whole = generate(
            demo_model, temperature=1.5, top_k=40, seed=seed, response_format=form
        )
        if not is_whole:
            continue
        ended += 1
        person = json.loads(text)
        assert set(person) >= {"name", "color", "lives"} and set(person) <= set(
            PERSON["properties"]
        )
        assert isinstance(person["name"], str) and len(person["name"]) <= 12
        assert person["color"] in ["red", "grün", 'a\\b "c"\n']
        assert isinstance(person["lives"]["floor"], int)
        assert person.get("tags", []) in ([], ["x"], ["x", "x"])
    assert ended > 6


def test_answer_ends_when_the_grammar_is_finished(demo_model: Llama) -> None:
    text, ended = generate(demo_model, temperature=1.5, grammar='root ::= "yes" | "no" "!"{3}')
    assert text in ("yes", "no!!!") and ended


def test_end_is_allowed_only_if_the_grammar_is_complete(demo_model: Llama) -> None:
    for seed in range(5):
        text, ended = generate(
            demo_model, temperature=1.5, seed=seed, grammar="root ::= ([a-z]+ [0-9])+"
        )
        assert re.fullmatch("([a-z]+[0-9])+" if ended else "([a-z]+[0-9])*[a-z]*", text)


def test_grammar_holds_for_greedy_and_for_unfiltered_sampling(demo_model: Llama) -> None:
    rules = 'root ::= [A-Z] [a-zé]{5,9} "."'
    for sampling in ({"temperature": 0}, {"temperature": 1.5, "top_k": 0, "top_p": 1.0}):
        text, ended = generate(demo_model, grammar=rules, **sampling)
        assert re.fullmatch(r"[A-Z][a-zé]{5,9}\.", text) and ended


def test_same_seed_gives_the_same_answer_with_a_grammar(demo_model: Llama) -> None:
    asked = {"temperature": 1.5, "seed": 3, "response_format": JsonObjectFormat()}
    assert generate(demo_model, 80, **asked) == generate(demo_model, 80, **asked)


@pytest.mark.parametrize(
    "rules",
    [
        JSON_GBNF,
        C_GBNF,
        ARITHMETIC_GBNF,
        'root ::= ("a" | "b"? "c"){2,5} [^x-z"]+ # a comment\n "\\n" (. | [é-ü])*'.replace(
            "\n ", " "
        ),
        'root ::= (\n "x" |\n [\\u00e9-\\U0001F600]+ )? [^\\x41]\r\n',
        'root ::= word "z" | "x" "yz" | "xy" "w"\nword ::= [a-z]+',
        'root ::= "a" root | [b-d]+ root | item ("," root)?\nitem ::= ([x-z] item)?',
    ],
    ids=["json", "c", "arithmetic", "repetitions", "escapes", "lexemes", "right recursion"],
)
def test_allowed_tokens_equal_those_of_llama_cpp(demo_model: Llama, rules: str) -> None:
    vocabulary = demo_model._vocabulary
    # we differ on purpose for bytes that are no characters and for NUL
    same = np.array([_is_text(piece) for piece in vocabulary.pieces]) | end_mask(demo_model)
    for seed in range(3):
        random = np.random.default_rng(seed)
        ours = compile_lark(to_lark(rules), vocabulary)
        theirs = llama_cpp.llama_sampler_init_grammar(demo_model._vocab, rules.encode(), b"root")
        for _ in range(25):
            allowed = ours.allowed()
            assert (allowed == _allowed_by(theirs, len(vocabulary)))[same].all()
            assert all(ours.allows(token) == allowed[token] for token in range(0, 1500, 50))
            choice = np.flatnonzero(allowed & same & ~end_mask(demo_model))
            if not len(choice):
                break
            token = int(random.choice(choice))
            ours.accept(token)
            llama_cpp.llama_sampler_accept(theirs, token)
        llama_cpp.llama_sampler_free(theirs)


def end_mask(demo_model: Llama) -> npt.NDArray[np.bool_]:
    return np.isin(np.arange(len(demo_model._vocabulary)), list(demo_model._vocabulary.ends))


def _is_text(piece: bytes) -> bool:
    try:
        return piece.decode() != "" and piece[0] != 0
    except UnicodeDecodeError:
        return False


def _allowed_by(sampler: llama_cpp.llama_sampler_p, size: int) -> npt.NDArray[np.bool_]:
    data = np.zeros(size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    data["id"] = np.arange(size)
    array = llama_cpp.llama_token_data_array(
        data=data.ctypes.data_as(llama_cpp.llama_token_data_p),
        size=size,
        selected=-1,
        sorted=False,
    )
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    allowed: npt.NDArray[np.bool_] = np.isfinite(data["logit"])
    return allowed


def test_multi_byte_characters_are_matched_byte_by_byte() -> None:
    assert matches('root ::= [é-ü]+ "🙂"', "éü🙂")
    assert not matches("root ::= [é-ü]+", "þ")
    assert matches("root ::= [^a]+", "🙂éz世")
    assert matches("root ::= .", "\n")
    for lead, middle in ((0xC3, 0x41), (0xE0, 0x80), (0xED, 0xA0), (0xF4, 0x90), (0xFF, 0x80)):
        grammar = compile_lark(to_lark("root ::= [^a]"), VOCABULARY)
        assert grammar.allows(lead) == (lead != 0xFF)
        if grammar.allows(lead):
            grammar.accept(lead)
            assert not grammar.may_end
            assert not grammar.allows(middle), f"{lead:x} {middle:x} is no UTF-8"


@pytest.mark.parametrize(
    ("rules", "fits", "fits_not"),
    [
        ('root ::= word "z"\nword ::= [a-z]+', ["abz", "zz"], ["z", "ab"]),
        ('root ::= "x" "yz" | "xy" "w"', ["xyz", "xyw"], ["xy", "xyy"]),
        ('root ::= fooBar foo-bar 1a\nfooBar ::= "x"\nfoo-bar ::= "y"\n1a ::= "z"', ["xyz"], ["z"]),
        ('root ::= "\\u00e9" [\\u00e9-\\u00ea] "\\x41\\t\\"" [/]', ['éêA\t"/'], ["e"]),
        ("root ::= [^a&&b]", ["c"], ["a", "&", "b"]),
        ('root ::= ("a" | ) "b"* (| "c"){2}', ["", "a", "bb", "acc"], ["ccc"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a"]),
        ('root ::= "a" later\nlater ::= later "b" | ""', ["a", "abb"], ["b"]),
        ('root ::= a root "z" | "x"\na ::= b\nb ::= "" | "y"', ["x", "yxz", "yyxzz"], ["y"]),
        ('root ::= "a"{2} "b"{1,} "c"{0,2}', ["aab", "aabbcc"], ["ab", "aabccc"]),
        ('root ::= "a" root | root "b" | "c"', ["c", "aac", "cb", "aacbb"], ["a", "ab", "cc"]),
        ("root ::= ([a-c] root)?", ["", "abc"], ["d"]),
        ('root ::= ("a" root) | ("b")?', ["", "ab", "aa"], ["ba"]),
        ('root ::= "a" root | root', [], ["", "a"]),
    ],
)
def test_gbnf_matches_the_texts_that_it_describes(
    rules: str, fits: list[str], fits_not: list[str]
) -> None:
    assert [text for text in fits if not matches(rules, text)] == []
    assert [text for text in fits_not if matches(rules, text)] == []


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ('item ::= "a"', "no rule `root`"),
        ("root ::= a b", "rule `a` is not defined"),
        ('root ::= "a', "character 9 can't be read"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', "closed that was not opened"),
        ('root ::= * "a"', "nothing before"),
        ('root ::= "a\\q"', "'\\\\\\\\q' at character 11 is not a known escape"),
        ('root ::= "a" a ::= "b"', "new line is missing"),
        ('"a"', "begins with a name"),
        ("root ::= <think>", "can't be read"),
        ('root ::= "a"{5,2}', "maximum below its minimum"),
        ("root ::= [z-y]", "ends before it begins"),
        ('root ::= "\\ud800"', "not a character"),
        ("root ::= root | root", "no token of this model"),
        ("root ::= " + "(" * 16_000, "not closed"),
        ("root ::= " + "(" * 8_000 + '"a"' + ")" * 8_000, "nested"),
    ],
)
def test_invalid_grammar_is_rejected_with_the_reason(rules: str, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        compile_lark(to_lark(rules), VOCABULARY)


@pytest.mark.parametrize(
    "rules",
    [
        'root ::= ([^e]|[^e]|[^e]|[^e]|[^e]|[^e])* "!"',  # not in 12 s by llama.cpp
        "root ::= a0\n"
        + "".join(f"a{i} ::= a{i + 1} | a{i + 1}\n" for i in range(40))
        + "a40 ::= .",
        "root ::= (a a a a a a a a)*\na ::= b b b b b b b b\nb ::= [^x]*",
        "root ::= . root root | .",
        f"root ::= x*\nc ::= [{WIDE}]\nx ::= " + "|".join(["c c"] * 500),
        f"root ::= x*\nc ::= [{WIDE}]\nx ::= " + "|".join(f"c [{WIDE[i]}]" for i in range(500)),
        'root ::= e{3900} "a"\ne ::= ' + "|" * 8_000,
        'root ::= e{3900} "a"\ne ::= ' + "|".join(f'"{char}"?' for char in WIDE),
        'root ::= ("a"?){5000}',
        'root ::= (("a"{300}){300}){0,99999}',
    ],
    ids=[
        "alternatives",
        "diamonds",
        "stars",
        "growth",
        "copies",
        "ranges",
        "nothing",
        "options",
        "optional",
        "repetitions",
    ],
)
def test_each_step_of_an_expensive_grammar_is_bounded(demo_model: Llama, rules: str) -> None:
    """Other sequences wait for one step at most."""
    vocabulary = demo_model._vocabulary
    started = time.thread_time()
    grammar = compile_lark(to_lark(rules), vocabulary)
    durations = [time.thread_time() - started]
    for _ in range(40):
        started = time.thread_time()
        allowed = grammar.allowed() & ~end_mask(demo_model)
        if not allowed.any():
            break
        grammar.accept(int(allowed.argmax()))
        durations.append(time.thread_time() - started)
    assert max(durations) < 1


@pytest.mark.parametrize("rules", ['root ::= [a-z ] root | "."', 'root ::= s "."\ns ::= (. s)?'])
def test_right_recursive_rule_has_no_length_limit(rules: str) -> None:
    grammar = compile_lark(to_lark(rules), VOCABULARY)
    for byte in b"many words " * 500:
        grammar.accept(byte)
    assert grammar.allowed()[ord(".")]


def test_long_chain_of_rules_does_not_crash() -> None:
    chain = "".join(f"a{i}::=a{i + 1}\n" for i in range(5_000))
    assert matches(f'root ::= a0\n{chain}a5000 ::= "x"', "x")


def test_literal_may_be_as_long_as_a_grammar() -> None:
    text = "ab" * 32_000
    grammar = compile_lark(to_lark(f'root ::= "{text}"'), VOCABULARY)
    assert grammar.allows(ord("a")) and not grammar.allows(ord("b"))


def test_grammar_ends_an_answer_without_end_tokens() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"\xff", b""], frozenset())
    grammar = compile_lark(to_lark('root ::= "ab"'), vocabulary)
    assert list(grammar.allowed()) == [True, False, False, False]
    grammar.accept(0)
    grammar.accept(1)
    assert grammar.is_finished and not grammar.allowed().any()


def test_complete_grammar_allows_every_end_token() -> None:
    vocabulary = Vocabulary([b"a", b"", b"<end>"], frozenset([1, 2]))
    grammar = compile_lark(to_lark('root ::= "a"*'), vocabulary)
    assert grammar.allowed().all() and grammar.allows(1) and grammar.allows(2)
    grammar.accept(2)
    assert grammar.may_end


def test_answer_without_an_allowed_token_raises_stuck() -> None:
    """The model has no token for the next character."""
    vocabulary = Vocabulary([b"a", b"c", b""], frozenset([2]))
    sampling = Sampling(temperature=1.0, grammar='root ::= "ab"')
    grammar = constraints.compile_grammar(sampling, None, vocabulary)
    sampler = SamplerChain(vocabulary, Candidates(3), sampling, grammar)
    logits = np.zeros(3, np.float32)
    first = sampler.choose(logits.copy())
    assert isinstance(first, SampledToken) and first.is_constrained
    second = sampler.choose(logits.copy())
    assert isinstance(second, ConstraintFailure) and "allows no token" in second.message
    sampler.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "more",
    [
        {"dry_multiplier": 5.0, "dry_allowed_length": 0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"top_n_sigma": 0.1},
        {"typical_p": 0.1},
        {"dynatemp_range": 1.0},
        {"mirostat": 1, "mirostat_tau": 0.1},
        {"mirostat": 2, "mirostat_tau": 0.1},
        {"ignore_eos": True},
    ],
    ids=str,
)
def test_each_sampler_obeys_a_grammar(
    demo_model: Llama, more: dict[str, Any], temperature: float
) -> None:
    """The grammar allows what the model would hardly say, and the same again and again."""
    grammar = 'root ::= ("zq" | "☃"){20} "."'
    text, is_last = generate(demo_model, temperature=temperature, seed=1, grammar=grammar, **more)
    assert re.fullmatch("(zq|☃){20}[.]", text) and is_last


def test_min_tokens_continues_a_grammar_that_may_end() -> None:
    vocabulary = Vocabulary([b"a", b"b", b""], frozenset([2]))
    likely_end = np.array([0, 0, 20], np.float32)
    for grammar, length in (('root ::= "a"*', 5), ('root ::= "ab"', 2)):
        sampling = Sampling(temperature=1.0, grammar=grammar, min_tokens=4)
        compiled = constraints.compile_grammar(sampling, None, vocabulary)
        sampler = SamplerChain(vocabulary, Candidates(3), sampling, compiled)
        chosen = [sampler.choose(likely_end.copy()) for _ in range(length)]
        sampler.close()
        assert all(isinstance(each, SampledToken) for each in chosen)
        assert [isinstance(c, SampledToken) and (c.is_last or c.token == 2) for c in chosen] == [
            *[False] * (length - 1),
            True,
        ]
