"""Reads the fields that completions and chat share: sampling, stops, output options, and those not built yet.

Used by `completion_request.py` and `chat_request.py`. Limits come first: nothing is tokenised or allocated here.
What this version cannot do is refused by name; what changes nothing is accepted, as clients send it.

Meanings: temperature below 1e-5 is greedy; top_k -1 and 0 mean all; seeds are taken modulo 2^64; a request without a
seed gets 64 random bits. `ignore_eos` runs are bounded by max_tokens and the context.
"""

from __future__ import annotations

import dataclasses
import re
import secrets

from penstock.cluster.ingress.call import ModelChoice, OutputOptions
from penstock.cluster.ingress.errors import model_not_found
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.grammar_fields import read_grammar
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.token_edits import read_token_edits, read_token_ids
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.protocol import SamplingParams, Tokens

GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1 << 31
_SALT = re.compile(r"[A-Za-z0-9_-]{1,256}\Z")
# Fields that are refused, with the values that change nothing and are accepted all the same.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "guided_decoding_backend": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "inputs_embeds": (),
    "multi_modal_data": (),
    "lora_request": (),
    "lora_path": (),
    "custom_logit_processor": (),
    "kv_transfer_params": (),
    "logprob_token_ids": ([],),
    "previous_response_id": (),
    "chat_template": (),
}
# Fields that are accepted, bounded, and not used.
UNUSED: dict[str, type] = {
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "request_id": str,
    "priority": int,
}


def read_model(fields: Fields, settings: IngressSettings) -> ModelChoice:
    """The model as the caller wrote it, and what that means now; absent means the base model."""
    name = fields.raw("model")
    if name is None:
        return ModelChoice(settings.model_names[0])
    if not isinstance(name, str):
        raise fields.refuse("model", f"must be a string, not {shown(name)}", "invalid_type")
    return named_model(name, settings)


def named_model(name: str, settings: IngressSettings) -> ModelChoice:
    """One of the model's own names, an adapter's, or `model:adapter`. Raises HttpProblem 404."""
    if name in settings.model_names:
        return ModelChoice(name)
    model, colon, plain = name.rpartition(":")  # adapters' names have none
    adapter = settings.adapters.find(plain) if not colon or model in settings.model_names else None
    if adapter is None:
        raise model_not_found(name)
    return ModelChoice(name, adapter)


def read_sampling(
    fields: Fields, settings: IngressSettings, text: TextCodec, calls: GrammarSpec | None = None
) -> SamplingParams:
    """Sampling of choice 0, without `max_tokens` (1 stands there) and logprobs. `calls`: the grammar of a chat's tools,
    which has taken in what else was asked for."""
    defaults = settings.defaults
    temperature = fields.number("temperature", 0.0, MAX_TEMPERATURE, defaults.temperature)
    top_k = fields.integer("top_k", -1, MAX_TOP_K, defaults.top_k) or 0
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    grammar = calls or read_grammar(fields, text)
    stop_ids = _stop_token_ids(fields, settings, text, grammar)
    edits = read_token_edits(fields, settings, text, stop_ids)
    return SamplingParams(
        max_tokens=1,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=0 if top_k == -1 or top_k >= text.vocab_size else top_k,
        top_p=fields.number("top_p", 0.0, 1.0, defaults.top_p, above=True),
        min_p=fields.number("min_p", 0.0, 1.0, defaults.min_p),
        seed=secrets.randbits(64) if seed is None else seed % (1 << 64),
        stop_token_ids=stop_ids,
        grammar=grammar,
        **{edit.name: getattr(edits, edit.name) for edit in dataclasses.fields(edits)},
    )


def read_output(fields: Fields, settings: IngressSettings, text: TextCodec) -> OutputOptions:
    """Streaming, usage, stops and the like."""
    stream = fields.boolean("stream")
    options = fields.child("stream_options")
    if options is not None and not stream:
        raise fields.refuse("stream_options", "only goes with stream: true")
    stops = _stops(fields, settings)
    if stops and not text.has_tokenizer:
        raise fields.refuse("stop", "needs a tokenizer, and this server runs without one; use stop_token_ids")
    return OutputOptions(
        stream=stream,
        include_usage=options.boolean("include_usage") if options else False,
        continuous_usage=options.boolean("continuous_usage_stats") if options else False,
        return_token_ids=fields.boolean("return_token_ids", default=not text.has_tokenizer),
        skip_special_tokens=fields.boolean("skip_special_tokens", default=True),
        include_stop=fields.boolean("include_stop_str_in_output"),
        stops=stops,
    )


def read_salt(fields: Fields) -> str:
    """The caller's separation of prefix caches; hashed, never used raw."""
    salt = fields.raw("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not _SALT.match(salt):
        raise fields.refuse("cache_salt", "must be 1 to 256 letters, digits, '-' or '_'")
    return salt


def refuse_unsupported(fields: Fields, settings: IngressSettings) -> None:
    """Fields that would change the answer and are not built yet; and the size of those that change nothing."""
    for name, harmless in UNSUPPORTED.items():
        fields.only(name, harmless)
    for name, kind in UNUSED.items():
        fields.sized(name, kind, settings.limits.max_label_bytes)


def read_max_tokens(fields: Fields, name: str, settings: IngressSettings, low: int = 1) -> int | None:
    """Stated bound on generated tokens; whether it fits depends on the prompt."""
    return fields.integer(name, low, max(settings.max_model_len, 1 << 31))


def read_truncation(fields: Fields, settings: IngressSettings, stated: int | None) -> int | None:
    """`truncate_prompt_tokens`: how many tokens to keep at the prompt's end; -1 = as many as the context allows."""
    most = settings.max_model_len - 1
    keep = fields.integer("truncate_prompt_tokens", -1, most)
    if keep == 0:
        raise fields.refuse("truncate_prompt_tokens", f"must be -1, or from 1 to {most}", "out_of_range")
    return max(1, settings.max_model_len - (stated or 1)) if keep == -1 else keep


def read_prompt_logprobs(fields: Fields, settings: IngressSettings) -> int | None:
    """`prompt_logprobs`: alternatives beside every prompt token."""
    wanted = fields.integer("prompt_logprobs", 0, settings.limits.max_logprobs)
    if wanted is not None and fields.raw("stream"):
        raise fields.refuse("prompt_logprobs", "does not go with stream: true", "unsupported_value")
    return wanted


def check_scored(prompts: tuple[Tokens, ...], wanted: int | None, settings: IngressSettings, field: str) -> None:
    """Refuse prompts whose scores would be too many for one answer."""
    entries = 0 if wanted is None else sum(map(len, prompts)) * (wanted + 1)
    if entries > settings.limits.max_prompt_logprobs:
        raise RequestError(
            f"{field}: logprobs of the prompts would be {entries} entries, more than "
            f"{settings.limits.max_prompt_logprobs}; send fewer prompts, or ask for fewer alternatives",
            field=field,
            code="out_of_range",
        )


def fit(stated: int | None, default: int | None, prompt: Tokens, settings: IngressSettings, field: str) -> int:
    """Tokens this prompt may generate: what was stated if it fits the context, else a 400; the default is clamped."""
    limit, used = settings.max_model_len, len(prompt)
    if used >= limit or (stated is not None and used + stated > limit):
        # In these words clients tell an overflow from other mistakes: not all of them look at the code.
        lead = "the prompt is too long: " if used >= limit else ""
        asked = f" and max_tokens asks for {stated} more" if stated is not None else ", which leaves none to generate"
        raise RequestError(
            f"{lead}this model's maximum context length is {limit} tokens, but the prompt has {used}{asked}",
            field=field,
            code="context_length_exceeded",
        )
    return stated if stated is not None else min(default or limit, limit - used)


def check_min_tokens(min_tokens: int, limits: Tokens) -> None:
    """A least length beyond the greatest cannot be kept."""
    if min_tokens > min(limits):
        raise RequestError(
            f"min_tokens: {min_tokens} is more than the {min(limits)} tokens that may be generated",
            field="min_tokens",
            code="out_of_range",
        )


def _stop_token_ids(fields: Fields, settings: IngressSettings, text: TextCodec, grammar: GrammarSpec | None) -> Tokens:
    stated = read_token_ids(fields, "stop_token_ids", text, settings.limits.max_stop_token_ids) or ()
    eos = () if fields.boolean("ignore_eos") else text.eos_token_ids
    ends = () if grammar is None else grammar.end_token_ids
    return tuple(sorted({*stated, *eos, *ends}))


def _stops(fields: Fields, settings: IngressSettings) -> tuple[str, ...]:
    limits = settings.limits
    stated = fields.raw("stop")
    items = [] if stated is None else [stated] if isinstance(stated, str) else stated
    if not isinstance(items, list) or len(items) > limits.max_stop_strings:
        raise fields.refuse("stop", f"must be a string or a list of at most {limits.max_stop_strings} strings")
    for item in items:
        if not isinstance(item, str):
            raise fields.refuse("stop", f"holds {shown(item)}, which is not a string", "invalid_type")
        if not item or len(item.encode()) > limits.max_stop_bytes:
            raise fields.refuse("stop", f"each string must have 1 to {limits.max_stop_bytes} bytes", "out_of_range")
    return tuple(dict.fromkeys(items))
