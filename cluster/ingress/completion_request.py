"""Parses the body of `POST /v1/completions` into a `Call`.

Called by `service.py` for every front. Prompts may be a string, strings, token ids, or lists of token ids; text is
bounded in bytes before it is tokenised. `echo` with `logprobs` scores the prompt; `max_tokens: 0` with `echo` only
scores: one token is generated, as something must be, and not shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.cluster.ingress.call import Call, OutputOptions
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.messages import check_text_length
from penstock.cluster.ingress.resumption import read_resumption
from penstock.cluster.ingress.sampling_fields import (
    check_min_tokens,
    check_scored,
    fit,
    read_max_tokens,
    read_model,
    read_output,
    read_prompt_logprobs,
    read_salt,
    read_sampling,
    read_truncation,
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
    fields.only("suffix", ("",))
    n = fields.integer("n", 1, settings.limits.max_choices, 1) or 1
    best_of = _best_of(fields, settings, n)
    logprobs, scored = _logprobs(fields, settings)
    # The best of several are found by their logprobs, which the caller need not have asked for.
    needed = 0 if logprobs is None and best_of > n else logprobs
    sampling = replace(read_sampling(fields, settings, text), logprobs=needed, prompt_logprobs=scored)
    output = _output(fields, settings, text, logprobs)
    salt = read_salt(fields)
    stated = read_max_tokens(fields, "max_tokens", settings, low=0 if output.echo else 1)
    output = replace(output, hide_generated=stated == 0)
    keep = read_truncation(fields, settings, stated)
    stated_prompts = read_prompts(fields, "prompt", settings, best_of)
    add_special = fields.boolean("add_special_tokens", default=True)
    prompts = tuple(read_ids(prompt, "prompt", settings, text, keep, add_special) for prompt in stated_prompts)
    check_scored(prompts, scored, settings, "prompt")
    stated = 1 if stated == 0 else stated
    limits = tuple(fit(stated, DEFAULT_MAX_TOKENS, prompt, settings, "prompt") for prompt in prompts)
    check_min_tokens(sampling.min_tokens, (0,) if output.hide_generated else limits)
    texts = _echoed(stated_prompts, prompts, keep is not None, output, text)
    resumption = read_resumption(fields, settings, text, len(prompts) * best_of, limits)
    return Call(
        model.name,
        prompts,
        limits,
        n,
        sampling,
        output,
        salt,
        best_of,
        texts,
        resumption=resumption,
        adapter=model.adapter,
    )


def read_prompts(fields: Fields, name: str, settings: IngressSettings, runs: int = 1) -> list[str | list[int]]:
    """The single prompts of a field in any of its four forms; token ids are not checked yet."""
    prompt = fields.raw(name)
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise fields.refuse(name, "must be text, token ids, or a list of either", "invalid_type")
    if not prompt:
        raise fields.refuse(name, "is empty")
    if all(type(item) is int for item in prompt):
        return [prompt]
    limits = settings.limits
    if len(prompt) > limits.max_prompts or len(prompt) * runs > limits.max_choices:
        raise fields.refuse(
            name,
            f"{len(prompt)} prompts x {runs} choices is more than {limits.max_prompts} prompts or "
            f"{limits.max_choices} choices",
            "out_of_range",
        )
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        return prompt
    odd = next(item for item in prompt if type(item) is not type(prompt[0]) or not isinstance(item, (str, list)))
    raise fields.refuse(name, f"{shown(odd)} does not belong into this list", "invalid_type")


def read_ids(
    prompt: str | list[int], name: str, settings: IngressSettings, text: TextCodec, keep: int | None, add_special: bool
) -> Tokens:
    """Ids of one prompt, or its last `keep`; checked against vocabulary and context before it is tokenised."""
    if not isinstance(prompt, str):
        ids = _checked(prompt, name, text)
        ids = ids if keep is None else text.cut(ids, keep)
    elif not prompt:
        ids = []
    elif keep is not None:
        ids = text.encode_end(prompt, name, keep, add_special)
    else:
        check_text_length(len(prompt), settings, text, name)
        ids = text.encode(prompt, name, add_special)
    if not ids:
        raise RequestError(f"{name}: is empty, or holds no token", field=name)
    return tuple(ids)


def _checked(ids: list[int], name: str, text: TextCodec) -> list[int]:
    if not all(type(token) is int and 0 <= token < text.vocab_size for token in ids):
        raise RequestError(
            f"{name}: token ids are integers from 0 to {text.vocab_size - 1}", field=name, code="out_of_range"
        )
    return ids


def _best_of(fields: Fields, settings: IngressSettings, n: int) -> int:
    best_of = fields.integer("best_of", 1, settings.limits.max_choices, n) or n
    if best_of < n:
        raise fields.refuse("best_of", f"must be at least n, which is {n}", "out_of_range")
    if best_of > n and fields.raw("stream"):
        raise fields.refuse("best_of", "does not go with stream: true", "unsupported_value")
    return best_of


def _logprobs(fields: Fields, settings: IngressSettings) -> tuple[int | None, int | None]:
    """Of the generated tokens, and of the prompt: asked for by itself, or by `echo`."""
    logprobs = fields.integer("logprobs", 0, settings.limits.max_logprobs)
    scored = read_prompt_logprobs(fields, settings)
    if fields.boolean("echo") and logprobs is not None:
        scored = max(logprobs, scored or 0)
    return logprobs, scored


def _output(fields: Fields, settings: IngressSettings, text: TextCodec, logprobs: int | None) -> OutputOptions:
    return replace(
        read_output(fields, settings, text),
        logprobs=logprobs is not None,
        prompt_logprobs=fields.raw("prompt_logprobs") is not None,
        echo=fields.boolean("echo"),
    )


def _echoed(
    stated: list[str | list[int]], prompts: tuple[Tokens, ...], cut: bool, output: OutputOptions, text: TextCodec
) -> tuple[str, ...]:
    """The prompts' texts: as the caller wrote them, decoded where ids came or text was cut."""
    if not output.echo:
        return ()
    if not text.has_tokenizer:
        return ("",) * len(prompts)
    return tuple(
        prompt if isinstance(prompt, str) and not cut else text.decode_whole(ids, output.skip_special_tokens)
        for prompt, ids in zip(stated, prompts, strict=True)
    )
