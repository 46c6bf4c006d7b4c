"""Reads what a caller already has of an answer, to go on behind it: the fields by which the Python handle rolls back.

Used by the two parsers, and by `choices.py` for the requests. `emitted_token_ids` are the choice's tokens so far; they
count in `max_tokens`, penalties, `min_tokens`, stop strings and grammars as if they had just been generated, and are
not told again; where they end an answer, nothing comes behind them. As noise depends on seed and position alone, the
same seed gives the same rest.

`forbidden_next_token_ids` may not come right behind them. That is said to the workers as bad words that begin with the
end of the context, so it is forbidden there, and where the very same tokens stand again, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.token_edits import FORBIDDEN, FORBIDDEN_TOKENS, read_token_ids
from penstock.cluster.text import TextCodec
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams, Tokens

EMITTED = "emitted_token_ids"
_CONTEXT_TOKENS = FORBIDDEN_TOKENS - 1  # of a context, by which its end is known again


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where a choice goes on. Empty: at its beginning."""

    emitted: Tokens = ()
    forbidden: Tokens = ()

    def end(self, sampling: SamplingParams) -> EndReason:
        """STOP if the emitted tokens end with one that ends an answer."""
        emitted = self.emitted
        stops = len(emitted) > sampling.min_tokens and emitted[-1] in sampling.stop_token_ids
        return EndReason.STOP if stops else EndReason.NONE

    def of(self, request: GenerateRequest) -> GenerateRequest:
        """The request, going on there."""
        if not self.emitted and not self.forbidden:
            return request
        end = (*request.prompt, *self.emitted)[-_CONTEXT_TOKENS:]
        words = tuple((*end, token) for token in self.forbidden)
        sampling = replace(request.sampling, bad_words=request.sampling.bad_words + words)
        return replace(request, emitted=self.emitted, sampling=sampling)


def read_resumption(
    fields: Fields, settings: IngressSettings, text: TextCodec, choices: int, limits: Tokens
) -> Resumption:
    """`choices` of all prompts together may have `limits` tokens. Raises RequestError naming the field."""
    emitted = fields.raw(EMITTED)
    forbidden = read_token_ids(fields, FORBIDDEN, text, settings.limits.max_bad_words) or ()
    if emitted is None and not forbidden:
        return Resumption()
    field = FORBIDDEN if emitted is None else EMITTED
    if choices > 1:
        raise fields.refuse(field, "goes with one prompt and one choice", "unsupported_value")
    for other in ("echo", "prompt_logprobs"):
        if fields.raw(other) is not None and fields.raw(other) is not False:
            raise fields.refuse(field, f"does not go with {other}", "unsupported_value")
    read_token_ids(fields, EMITTED, text, settings.max_model_len)
    tokens = tuple(emitted or ())
    if len(tokens) >= limits[0]:
        reason = f"holds {len(tokens)} tokens, and max_tokens, which counts them, is {limits[0]}"
        raise fields.refuse(EMITTED, reason, "out_of_range")
    return Resumption(tokens, forbidden)
