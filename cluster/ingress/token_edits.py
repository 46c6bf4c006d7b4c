"""Reads the fields that change which tokens may come: penalties, biases, bans, allowed ids, and a least length.

Used by `sampling_fields.py` for every front. Bounds come before anything is tokenised; a request that would leave no
token at all is refused here, so that no step ever normalises over nothing.

`bad_words` are banned as token sequences, both as they stand and after a space, as vLLM does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.workers.protocol import Tokens
from penstock.workers.request_check import MAX_BAD_WORD_TOKENS

MAX_PENALTY = 2.0
REPETITION_RANGE = (0.01, 100.0)
MAX_BIAS = 100.0
BANNING_BIAS = -MAX_BIAS  # OpenAI: "should result in a ban"
FORBIDDEN = "forbidden_next_token_ids"  # not right behind what is there already; see `resumption.py`
FORBIDDEN_TOKENS = 33  # of the bad word that each of them becomes
_TOKEN_ID = re.compile(r"(?:0|[1-9][0-9]{0,9})\Z")
Bias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEdits:
    """The part of SamplingParams that edits logits; same names, same meanings."""

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Bias
    bad_words: tuple[Tokens, ...]
    allowed_token_ids: Tokens | None
    min_tokens: int


def read_token_edits(fields: Fields, settings: IngressSettings, text: TextCodec, stop_ids: Tokens) -> TokenEdits:
    """Raises RequestError naming the field. `stop_ids` are banned while `min_tokens` are not reached."""
    forbidden = read_token_ids(fields, FORBIDDEN, text, settings.limits.max_bad_words) or ()
    edits = TokenEdits(
        presence_penalty=fields.number("presence_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
        repetition_penalty=fields.number("repetition_penalty", *REPETITION_RANGE, settings.defaults.repetition_penalty),
        logit_bias=_logit_bias(fields, settings, text),
        bad_words=_bad_words(fields, settings, text, MAX_BAD_WORD_TOKENS - FORBIDDEN_TOKENS * len(forbidden)),
        allowed_token_ids=_allowed(fields, settings, text),
        min_tokens=fields.integer("min_tokens", 0, settings.max_model_len, 0) or 0,
    )
    _leave_something(edits, fields, text.vocab_size, stop_ids, forbidden)
    return edits


def read_token_ids(fields: Fields, name: str, text: TextCodec, most: int) -> Tokens | None:
    """A list of at most `most` ids of the vocabulary, sorted and each once; None when absent."""
    stated = fields.raw(name)
    if stated is None:
        return None
    if not isinstance(stated, list) or len(stated) > most:
        raise fields.refuse(name, f"must be a list of at most {most} token ids", "invalid_type")
    if not all(type(token) is int and 0 <= token < text.vocab_size for token in stated):
        raise fields.refuse(name, f"token ids are integers from 0 to {text.vocab_size - 1}", "out_of_range")
    return tuple(sorted(set(stated)))


def _logit_bias(fields: Fields, settings: IngressSettings, text: TextCodec) -> Bias:
    stated = fields.child("logit_bias")
    if stated is None:
        return ()
    most = settings.limits.max_logit_bias
    names = stated.keys()
    if len(names) > most:
        raise fields.refuse("logit_bias", f"holds more than {most} entries", "out_of_range")
    found: list[tuple[int, float]] = []
    for key in names:
        if not _TOKEN_ID.match(key) or int(key) >= text.vocab_size:
            raise fields.refuse(
                "logit_bias", f"keys are token ids from 0 to {text.vocab_size - 1}, not {shown(key)}", "out_of_range"
            )
        if stated.raw(key) is None:
            raise stated.refuse(key, "must be a number, not null", "invalid_type")
        value = stated.number(key, -MAX_BIAS, MAX_BIAS, 0.0)
        if value:
            found.append((int(key), value))
    return tuple(sorted(found))


def _bad_words(fields: Fields, settings: IngressSettings, text: TextCodec, most: int) -> tuple[Tokens, ...]:
    """Of at most `most` tokens in all."""
    limits = settings.limits
    stated = fields.raw("bad_words")
    if stated is None:
        return ()
    if not isinstance(stated, list) or len(stated) > limits.max_bad_words:
        raise fields.refuse("bad_words", f"must be a list of at most {limits.max_bad_words} strings", "invalid_type")
    found: dict[Tokens, None] = {}
    for word in stated:
        if not isinstance(word, str):
            raise fields.refuse("bad_words", f"holds {shown(word)}, which is not a string", "invalid_type")
        if not word or len(word.encode()) > limits.max_stop_bytes:
            raise fields.refuse("bad_words", f"each must have 1 to {limits.max_stop_bytes} bytes", "out_of_range")
        for form in (word, " " + word.lstrip()):
            tokens = tuple(text.encode(form, "bad_words", add_special_tokens=False))
            if tokens:
                found[tokens] = None
    if sum(map(len, found)) > most:
        raise fields.refuse("bad_words", f"are more than {most} tokens in all, each written in two ways", "too_long")
    return tuple(found)


def _allowed(fields: Fields, settings: IngressSettings, text: TextCodec) -> Tokens | None:
    allowed = read_token_ids(fields, "allowed_token_ids", text, settings.limits.max_allowed_token_ids)
    if allowed is not None and not allowed:
        raise fields.refuse("allowed_token_ids", "is empty, which leaves no token to generate")
    return allowed


def _leave_something(edits: TokenEdits, fields: Fields, vocab_size: int, stop_ids: Tokens, forbidden: Tokens) -> None:
    """At every step some token must be left, whatever came before it."""
    banned = {token for token, bias in edits.logit_bias if bias <= BANNING_BIAS}
    ends = {word[-1] for word in edits.bad_words}
    stops = set(stop_ids) if edits.min_tokens else set()
    bans = {"logit_bias": banned, "bad_words": ends, "min_tokens": stops, FORBIDDEN: set(forbidden)}
    together = set[int]().union(*bans.values())
    if edits.allowed_token_ids is None:
        left = vocab_size > len(together)
    else:
        left = not together.issuperset(edits.allowed_token_ids)
    if not left:
        field = max(bans, key=lambda name: len(bans[name]))
        raise fields.refuse(field, "together with the other fields this may ban every token")
