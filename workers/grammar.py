"""Follows grammars token by token: what may come next, as a mask over the vocabulary. Built on llguidance.

`grammar_store.py` compiles with it in a worker, `cluster/ingress/grammar_child.py` tries grammars out with it before
they are accepted; the scheduler holds one `GrammarGuide` per sequence. Knows a tokenizer's file and token ids; no
requests, no tensors.

A guide depends on its grammar and on the tokens it was given, so every worker that is given the same makes the same
masks. All limits are the library's counters, never a clock: they end a grammar at the same token on every machine.

Invariants: a mask allows at least one token; an end token is allowed exactly where the text is complete; where the
text cannot go on, nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from numpy.typing import NDArray

from penstock.workers.errors import GrammarError
from penstock.workers.grammar_spec import WHITESPACE, GrammarKind, GrammarSpec

I32 = NDArray[np.int32]

_WORD_BITS = 32
_MAX_REASON_CHARS = 300
# At the library's speeds (14,000 and 20,000 a millisecond) a mask takes a few milliseconds at most.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_SILENT = 0
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # hold schemas by any name
_DATA = ("const", "enum", "default", "examples")  # hold values, which only look like schemas


class GrammarVocabulary:
    """A model's tokens as the bytes they stand for. Making one takes up to a second and holds the interpreter."""

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        """`vocab_size`: of the logits. Raises GrammarError for a tokenizer that cannot be constrained."""
        self.vocab_size = vocab_size
        self.words = -(-vocab_size // _WORD_BITS)
        self.end_mark = _end_mark(tokenizer_json, vocab_size)
        try:
            self.tokens = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=[self.end_mark])
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer cannot be constrained: {_short(error)}") from error

    def bits(self, tokens: tuple[int, ...]) -> I32:
        """A mask [words] of these tokens; those outside the vocabulary are left out."""
        mask = np.zeros(self.words, np.uint32)
        known = np.array([token for token in tokens if 0 <= token < self.vocab_size], np.int64)
        np.bitwise_or.at(mask, known // _WORD_BITS, np.uint32(1) << (known % _WORD_BITS).astype(np.uint32))
        return mask.view(np.int32)


class CompiledGrammar:
    """A grammar over a vocabulary, from which any number of guides can be had."""

    def __init__(self, spec: GrammarSpec, vocabulary: GrammarVocabulary) -> None:
        """Raises GrammarError with the library's reason. The interpreter is free meanwhile."""
        self._vocabulary = vocabulary
        self._ends = vocabulary.bits(spec.end_token_ids)
        if not self._ends.any():
            raise GrammarError("the grammar has no token of this model that ends it")
        self._matcher = LLMatcher(vocabulary.tokens, _source(spec), log_level=_SILENT, limits=_LIMITS)
        if self._matcher.is_error():
            raise GrammarError(_short(self._matcher.get_error()))

    def guide(self, emitted: tuple[int, ...] = ()) -> GrammarGuide:
        """A guide after these tokens. Raises GrammarError where they do not follow the grammar."""
        return GrammarGuide(self._matcher.deep_copy(), self._vocabulary, self._ends, emitted)


class GrammarGuide:
    """One sequence's place in its grammar. `mask` int32 [words]: bit t % 32 of word t // 32 allows token t next."""

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary, ends: I32, emitted: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._ends = ends
        self._no_text = ~(ends | vocabulary.bits((vocabulary.end_mark,)))
        self.mask: I32 = np.zeros(vocabulary.words, np.int32)
        if emitted and not matcher.consume_tokens(list(emitted)):
            raise GrammarError("the tokens so far do not follow the grammar")
        self._look_ahead()

    def advance(self, token: int) -> None:
        """The token was sampled, and does not end the choice. Raises GrammarError; the guide is of no use then."""
        if not self._matcher.consume_token(token):
            raise GrammarError("the grammar is too complex to be followed any further")
        self._look_ahead()

    def _look_ahead(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if self._matcher.is_error():
            raise GrammarError("the grammar leads nowhere, or is too complex to be followed any further")
        self.mask &= self._no_text
        if self._matcher.is_accepting():
            self.mask |= self._ends
        elif not self.mask.any():
            raise GrammarError("the grammar allows no token of this model, and its text is not complete")


def _source(spec: GrammarSpec) -> str:
    """The grammar in the library's own form."""
    try:
        if spec.kind is GrammarKind.REGEX:
            _check_end(spec.text)
            return LLMatcher.grammar_from_regex(spec.text)
        if spec.kind is GrammarKind.LARK:
            return str(grammar_from("grammar", spec.text))
        schema: Any = json.loads(spec.text)
        schema = {} if schema is True else schema
        for pattern in _patterns(schema):
            _check_end(pattern)
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE})
    except (ValueError, RecursionError) as error:
        what = "JSON schema" if spec.kind is GrammarKind.JSON_SCHEMA else spec.kind.value
        raise GrammarError(f"not a {what}: {_short(error)}") from error


def _check_end(regex: str) -> None:
    """The library leaves out a backslash that nothing follows; others refuse it, and so do we. Raises ValueError."""
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise ValueError("a regular expression ends with the beginning of an escape")


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions of a JSON schema, wherever they stand in it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            named = part.get("patternProperties")
            yield from named if isinstance(named, dict) else ()
            for key, value in part.items():
                if key in _BY_NAME and isinstance(value, dict):
                    waiting += value.values()
                elif key not in _DATA:
                    waiting.append(value)


def _end_mark(tokenizer_json: str, vocab_size: int) -> int:
    """A token that never is text, which the library may take for the end of one. Raises GrammarError."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        special = [int(token["id"]) for token in added if token.get("special")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GrammarError("this model's tokenizer.json cannot be read") from error
    for token in special:
        if 0 <= token < vocab_size:
            return token
    raise GrammarError("this model's tokenizer has no special token, so no text of its can be constrained")


def _short(reason: object) -> str:
    """A library's reason in one line, without the state that it may append."""
    lines = str(reason).partition("<state>")[0].split("\n")
    text = " ".join(line.strip() for line in lines if line.strip())
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]}…"
