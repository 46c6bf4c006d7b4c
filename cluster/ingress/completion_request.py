"""Parses the body of `POST /v1/completions` into a `Call`.

Called by `app.py`. Prompts may be a string, strings, token ids, or lists of token ids; text is bounded in bytes
before it is tokenised.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.sampling_fields import (
    fit,
    read_max_tokens,
    read_model,
    read_output,
    read_salt,
    read_sampling,
    refuse_unsupported,
)
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError
from penstock.workers.protocol import Tokens

DEFAULT_MAX_TOKENS = 16


def parse_completion(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> Call:
    """Raises RequestError or HttpProblem naming the field."""
    fields = Fields(body)
    model = read_model(fields, settings)
    refuse_unsupported(fields, settings)
    fields.only("echo", (False,))
    fields.only("suffix", ("",))
    n = fields.integer("n", 1, settings.limits.max_choices, 1) or 1
    fields.only("best_of", (1, n))
    logprobs = fields.integer("logprobs", 0, settings.limits.max_logprobs)
    sampling = read_sampling(fields, settings, text, logprobs)
    output = read_output(fields, settings, text)
    salt = read_salt(fields)
    stated = read_max_tokens(fields, "max_tokens", settings)
    raw_prompts = _separate(fields.raw("prompt"), settings, n)
    add_special = fields.boolean("add_special_tokens", default=True)
    prompts = tuple(_ids(prompt, settings, text, add_special) for prompt in raw_prompts)
    limits = tuple(fit(stated, DEFAULT_MAX_TOKENS, prompt, settings, "prompt") for prompt in prompts)
    return Call(model, prompts, limits, n, sampling, output, salt)


def _separate(prompt: object, settings: IngressSettings, n: int) -> list[str | list[int]]:
    """The single prompts in any of the four accepted forms."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise RequestError("prompt: must be text, token ids, or a list of either", field="prompt", code="invalid_type")
    if not prompt:
        raise RequestError("prompt: is empty", field="prompt")
    if all(type(item) is int for item in prompt):
        return [prompt]
    if len(prompt) > settings.limits.max_prompts or len(prompt) * n > settings.limits.max_choices:
        raise RequestError(
            f"prompt: {len(prompt)} prompts x n {n} is more than {settings.limits.max_prompts} prompts or "
            f"{settings.limits.max_choices} choices",
            field="prompt",
            code="out_of_range",
        )
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return prompt
    odd = next(item for item in prompt if type(item) is not type(prompt[0]) or not isinstance(item, (str, list)))
    raise RequestError(f"prompt: {shown(odd)} does not belong into this list", field="prompt", code="invalid_type")


def _ids(prompt: str | list[int], settings: IngressSettings, text: TextCodec, add_special: bool) -> Tokens:
    """Token ids of one prompt, checked against vocabulary and context before and after tokenising."""
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("prompt: is empty", field="prompt")
        check_text_length(len(prompt), settings, text, "prompt")
        ids = text.encode(prompt, "prompt", add_special)
    else:
        ids = prompt
        if not all(type(token) is int and 0 <= token < text.vocab_size for token in ids):
            raise RequestError(
                f"prompt: token ids are integers from 0 to {text.vocab_size - 1}", field="prompt", code="out_of_range"
            )
    if not ids:
        raise RequestError("prompt: holds no token", field="prompt")
    return tuple(ids)


def check_text_length(num_chars: int, settings: IngressSettings, text: TextCodec, field: str) -> None:
    """Refuse text that cannot fit the context however it is cut into tokens; a character has at least one byte."""
    most = text.longest_text(settings.max_model_len)
    if text.has_tokenizer and num_chars > most:
        raise RequestError(
            f"{field}: {num_chars} characters cannot fit this model's maximum context length of "
            f"{settings.max_model_len} tokens",
            field=field,
            code="context_length_exceeded",
        )
