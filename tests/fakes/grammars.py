"""Grammars over the embedded model, a plain loop that follows them, and guides that are there at once.

`follow_plainly` is the judge: transformers' logits, llguidance's own mask, argmax; it shares no code with the engine.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.grammar_store import GrammarStore, open_grammars
from penstock.workers.protocol import Tokens
from penstock.workers.scheduler.grammars import Guide

VOCAB = 1536
ENDS = (0, 4)  # of the embedded model
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "married"],
    "additionalProperties": False,
}
SPECS = (
    GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(PERSON), ENDS),
    GrammarSpec(GrammarKind.REGEX, "[a-z]{3,9}( [a-z]{2,9}){4,12}[.!]", ENDS),
    GrammarSpec(GrammarKind.LARK, 'start: expr\nexpr: NUM | "(" expr /[-+*]/ expr ")"\nNUM: /[0-9]{1,3}/', ENDS),
    GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "object"}', ENDS),
    GrammarSpec(GrammarKind.LARK, 'start: "yes, certainly" | "no, never" | "perhaps"', ENDS),
)


class PatientGrammars:
    """The guides of a real store, waited for: a scheduler that is stepped by hand admits their requests at once."""

    def __init__(self) -> None:
        self.store: GrammarStore = open_grammars(str(EMBEDDED_MODEL), VOCAB, lambda: None)

    def begin(self, spec: GrammarSpec, emitted: Tokens) -> Future[Guide]:
        future = self.store.begin(spec, emitted)
        wait([future])
        return future


@functools.cache
def plain_tokenizer() -> LLTokenizer:
    return LLTokenizer((EMBEDDED_MODEL / "tokenizer.json").read_text(), n_vocab=VOCAB, eos_token=list(ENDS))


def plain_matcher(spec: GrammarSpec) -> LLMatcher:
    """As the library's own examples make one, but for the bound on white space."""
    if spec.kind is GrammarKind.JSON_SCHEMA:
        options: Any = {"whitespace_pattern": r"[ \t\r\n]{0,40}"}
        source = LLMatcher.grammar_from_json_schema(spec.text, defaults=options)
    elif spec.kind is GrammarKind.REGEX:
        source = LLMatcher.grammar_from_regex(spec.text)
    else:
        source = LLMatcher.grammar_from_lark(spec.text)
    return LLMatcher(plain_tokenizer(), source)


def allowed_by(matcher: LLMatcher) -> np.ndarray:
    """bool [V]."""
    octets = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(octets, bitorder="little")[:VOCAB].astype(bool)


@torch.inference_mode()
def follow_plainly(model: Any, prompt: Tokens, spec: GrammarSpec, count: int) -> list[int]:
    """Greedy tokens of a transformers model under the grammar, the end included, one forward pass per token."""
    matcher, found, past, fed = plain_matcher(spec), [], None, list(prompt)
    for _ in range(count):
        output = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
        logits, past = output.logits[0, -1].numpy(), output.past_key_values
        token = int(np.where(allowed_by(matcher), logits, -np.inf).argmax())
        found.append(token)
        fed = [token]
        if token in ENDS:
            break
        assert matcher.consume_token(token)
    return found


def text_of(tokens: list[int]) -> str:
    """What the tokens say, without the end."""
    return plain_tokenizer().decode_str([token for token in tokens if token not in ENDS])
