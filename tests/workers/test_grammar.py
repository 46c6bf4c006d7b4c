"""Masks over a real vocabulary: texts that match end, others cannot be written; hostile grammars cost microseconds."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes.grammars import ENDS, SPECS, VOCAB, plain_tokenizer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.errors import GrammarError
from penstock.workers.grammar import CompiledGrammar, GrammarGuide, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec

TOKENIZER = (EMBEDDED_MODEL / "tokenizer.json").read_text()
VOCABULARY = GrammarVocabulary(TOKENIZER, VOCAB)
SCHEMA, REGEX, LARK = GrammarKind


def allowed(guide: GrammarGuide) -> list[int]:
    bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
    assert not bits[VOCAB:].any()
    return np.flatnonzero(bits).tolist()


def compiled(kind: GrammarKind, text: Any, ends: tuple[int, ...] = ENDS) -> CompiledGrammar:
    return CompiledGrammar(GrammarSpec(kind, text if isinstance(text, str) else json.dumps(text), ends), VOCABULARY)


def write(guide: GrammarGuide, seed: int, most: int = 400) -> list[int]:
    """Random allowed tokens, ends as soon as they may come after a while; [] where `most` are too few."""
    rng, tokens = np.random.default_rng(seed), []
    for _ in range(most):
        choices = allowed(guide)
        end = set(choices) & set(ENDS)
        if end and (len(tokens) > 60 or len(end) == len(choices)):
            return tokens
        token = int(rng.choice([c for c in choices if c not in ENDS]))
        guide.advance(token)
        tokens.append(token)
    return []


def test_ends_come_where_the_text_is_complete_and_only_there() -> None:
    guide = compiled(REGEX, "ab?").guide()
    a, b = (plain_tokenizer().tokenize_str(letter)[0] for letter in "ab")
    assert set(allowed(guide)).isdisjoint(ENDS)
    guide.advance(a)
    assert set(allowed(guide)) == {b, *ENDS}
    guide.advance(b)
    assert set(allowed(guide)) == set(ENDS)
    with pytest.raises(GrammarError):
        guide.advance(a)


def test_a_guide_goes_on_from_any_token() -> None:
    grammar = compiled(SCHEMA, SPECS[0].text)
    tokens = write(grammar.guide(), seed=5)
    walked = grammar.guide()
    for count, token in enumerate(tokens):
        assert (grammar.guide(tuple(tokens[:count])).mask == walked.mask).all()
        walked.advance(token)
    with pytest.raises(GrammarError, match="do not follow"):
        grammar.guide((*tokens, *tokens))


def test_guides_do_not_share_their_place() -> None:
    grammar = compiled(REGEX, "[a-z]{5}")
    one, other = grammar.guide(), grammar.guide()
    before = other.mask.copy()
    one.advance(allowed(one)[0])
    assert (other.mask == before).all()
    assert (grammar.guide().mask == before).all()


leaf = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 250},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 8},
        {"type": "string", "pattern": "^[A-Z][a-z]{2,4}$"},
        {"enum": ["x", 'quo"te', 7, None]},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 3},
    ]
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def record(parts: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": parts, "required": list(parts)[::2], "additionalProperties": False}

    names = st.text('abcä_"\\ ', min_size=1, max_size=5)
    return (
        st.dictionaries(names, inner, min_size=1, max_size=3).map(record)
        | inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3})
        | st.tuples(inner, inner).map(lambda pair: {"anyOf": list(pair)})
    )


@given(st.recursive(leaf, nested, max_leaves=5), st.integers(0, 2**20))
@settings(deadline=None, max_examples=60)
def test_whatever_is_written_under_a_schema_validates(schema: dict[str, Any], seed: int) -> None:
    tokens = write(compiled(SCHEMA, schema).guide(), seed)
    if tokens:
        jsonschema.validate(json.loads(text_of(tokens)), schema)


@given(st.sampled_from(["[a-c]{2,4}(,[0-9]+){0,3}", "(foo|ba[rz])+!?", "é?(日本|x)*y"]), st.integers(0, 2**20))
@settings(deadline=None, max_examples=40)
def test_whatever_is_written_under_a_regex_matches(pattern: str, seed: int) -> None:
    tokens = write(compiled(REGEX, pattern).guide(), seed)
    assert not tokens or re.fullmatch(pattern, text_of(tokens))


def test_white_space_between_json_parts_has_a_bound() -> None:
    guide = compiled(SCHEMA, {"type": "array"}).guide()
    tokenizer = plain_tokenizer()
    for token in tokenizer.tokenize_str("[" + " " * 40):
        guide.advance(token)
    assert not any(tokenizer.decode_bytes([t]).startswith(b" ") for t in allowed(guide) if t not in ENDS)


DEEP = '{"items":' * 500 + "{}" + "}" * 500


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (SCHEMA, "{", "not a JSON schema"),
        (SCHEMA, {"type": 5}, "type must be"),
        (SCHEMA, {"type": "string", "minLength": 5, "maxLength": 1}, "Unsatisfiable"),
        (SCHEMA, {"$ref": "http://127.0.0.1:1/s"}, "does not fetch"),
        (SCHEMA, {"$ref": "file:///etc/passwd"}, "does not fetch"),
        (SCHEMA, {"not": {}}, "Unimplemented"),
        (SCHEMA, "false", "not a JSON schema"),
        (REGEX, "a\\", "escape"),
        (REGEX, "\\\\\\", "escape"),
        (SCHEMA, {"type": "string", "pattern": "a\\"}, "escape"),
        (SCHEMA, {"properties": {"enum": {"items": [{"type": "string", "pattern": "\\d\\"}]}}}, "escape"),
        (SCHEMA, {"patternProperties": {"x\\": {}}}, "escape"),
        (SCHEMA, DEEP, "recursion"),
        (SCHEMA, "[" * 60_000, "not a JSON schema"),
        (SCHEMA, '{}}]}, {"lark_grammar": "start: /a/', "not a JSON schema"),
        (REGEX, "[", "unclosed"),
        (REGEX, "\ud800", "not a regex"),
        (LARK, "\ud800", "not a lark"),
        (REGEX, "(?=a)b", "look-around"),
        (LARK, "start: nobody", "unknown name"),
        (LARK, "start: start", "leads nowhere"),
        (LARK, "", ""),
    ],
)
def test_grammars_that_cannot_be_followed_say_why(kind: GrammarKind, text: Any, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiled(kind, text).guide()
    assert re.search(says, str(caught.value))
    assert len(str(caught.value)) < 400


HOSTILE = (
    (REGEX, "(a+)+b"),
    (REGEX, "(.{1,5000}){1,5000}"),
    (REGEX, "(a|b)*a(a|b){20}[a-z ]{500}"),
    (REGEX, "(a?){200}a{200}"),
    (REGEX, "(.*a.*){50}"),
    (SCHEMA, {"enum": [f"x{n}" for n in range(5000)]}),
    (SCHEMA, {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1000)}}),
    (LARK, 'start: a\na: a a | "x"'),
    (LARK, "\n".join(["start: r0", *(f'r{n}: r{n + 1} r{n + 1} | "q"' for n in range(60)), 'r60: "z"'])),
)


@pytest.mark.parametrize(("kind", "text"), HOSTILE)
def test_hostile_grammars_are_bounded_work(kind: GrammarKind, text: Any) -> None:
    """Processor time, not the clock: the machine may be busy. What exceeds a limit ends typed."""
    began = time.thread_time()
    try:
        guide = compiled(kind, text).guide()
        for _ in range(30):
            choices = [token for token in allowed(guide) if token not in ENDS]
            if not choices:
                break
            guide.advance(choices[len(choices) // 2])
    except GrammarError:
        pass
    assert time.thread_time() - began < 3.0


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a\\\\"},
        {"const": {"pattern": "a\\"}},
        {"type": "object", "properties": {"pattern": {"enum": ["a\\", {"pattern": "a\\"}]}}},
        {"$defs": {"pattern": {"type": "integer"}}, "$ref": "#/$defs/pattern"},
    ],
)
def test_what_only_looks_like_a_broken_pattern_is_none(schema: Any) -> None:
    assert allowed(compiled(SCHEMA, schema).guide())


def test_a_grammar_needs_an_end_and_a_vocabulary() -> None:
    with pytest.raises(GrammarError, match="ends it"):
        compiled(REGEX, "a", ())
    with pytest.raises(GrammarError, match="ends it"):
        compiled(REGEX, "a", (VOCAB,))
    for broken in ("", "5", "{}", json.dumps({"added_tokens": [{"id": 0, "special": False}]})):
        with pytest.raises(GrammarError):
            GrammarVocabulary(broken, VOCAB)


def test_ids_without_a_token_are_never_allowed() -> None:
    wide = GrammarVocabulary(TOKENIZER, 2000)
    guide = CompiledGrammar(SPECS[1], wide).guide()
    bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
    assert bits.any()
    assert not bits[VOCAB:].any()
