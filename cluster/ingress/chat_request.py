"""Parses the body of `POST /v1/chat/completions` into a `Call`.

Called by `service.py` for every front. Templates never come from the request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.messages import encode_messages
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
from penstock.cluster.ingress.tool_fields import read_tools
from penstock.cluster.text import TextCodec

CHAT_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "functions": ([],),  # older forms of tools and tool_choice
    "function_call": ("none",),
    "echo": (False,),
    "best_of": (1,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}


def parse_chat(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> Call:
    """Raises RequestError or HttpProblem naming the field."""
    fields = Fields(body)
    model = read_model(fields, settings)
    refuse_unsupported(fields, settings)
    for name, harmless in CHAT_UNSUPPORTED.items():
        fields.only(name, harmless)
    n = fields.integer("n", 1, settings.limits.max_choices, 1) or 1
    logprobs, scored = _logprobs(fields, settings), read_prompt_logprobs(fields, settings)
    tools = read_tools(fields, settings, text)
    sampling = replace(read_sampling(fields, settings, text, tools.grammar), logprobs=logprobs, prompt_logprobs=scored)
    output = replace(
        read_output(fields, settings, text), logprobs=logprobs is not None, prompt_logprobs=scored is not None
    )
    salt = read_salt(fields)
    stated = read_max_tokens(fields, "max_completion_tokens", settings)
    older = read_max_tokens(fields, "max_tokens", settings)
    stated = older if stated is None else stated
    keep = read_truncation(fields, settings, stated)
    ids = encode_messages(fields, settings, text, tools.shown)
    prompt = tuple(ids if keep is None else text.cut(ids, keep))
    check_scored((prompt,), scored, settings, "messages")
    limits = (fit(stated, settings.defaults.max_tokens, prompt, settings, "messages"),)
    check_min_tokens(sampling.min_tokens, limits)
    resumption = read_resumption(fields, settings, text, n, limits)
    return Call(
        model.name,
        (prompt,),
        limits,
        n,
        sampling,
        output,
        salt,
        tools=tools,
        resumption=resumption,
        adapter=model.adapter,
    )


def _logprobs(fields: Fields, settings: IngressSettings) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, settings.limits.max_logprobs)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "only goes with logprobs: true")
    return (top or 0) if wanted else None
