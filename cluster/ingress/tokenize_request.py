"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in vLLM's shapes.

Used by `service.py`. Text is bounded in bytes before it is tokenised; it may be longer than the context, since
callers tokenise whole documents to cut them themselves.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.logprob_format import token_text
from penstock.cluster.ingress.messages import encode_messages
from penstock.cluster.ingress.sampling_fields import read_model, refuse_unsupported
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.template_variables import read_continuation, read_variables
from penstock.cluster.ingress.tool_fields import check_tools, read_tools
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError


def tokenize(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> dict[str, Any]:
    """Ids of `prompt`, or of the prompt that `messages` make. Raises RequestError or HttpProblem."""
    fields = Fields(body)
    read_model(fields, settings)
    refuse_unsupported(fields, settings)
    ids = _ids(fields, settings, text)
    strings = [token_text(text, token) for token in ids] if fields.boolean("return_token_strs") else None
    return {"tokens": ids, "count": len(ids), "max_model_len": settings.max_model_len, "token_strs": strings}


def detokenize(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> dict[str, Any]:
    """Text of `tokens`. Raises RequestError or HttpProblem."""
    fields = Fields(body)
    read_model(fields, settings)
    refuse_unsupported(fields, settings)
    tokens = fields.raw("tokens")
    if not isinstance(tokens, list):
        raise fields.refuse("tokens", f"must be a list of token ids, not {shown(tokens)}", "invalid_type")
    most = settings.limits.max_tokenize_bytes  # a token has at least one byte
    if len(tokens) > most:
        raise fields.refuse("tokens", f"must hold at most {most} token ids", "out_of_range")
    if not all(type(token) is int and 0 <= token < text.vocab_size for token in tokens):
        raise fields.refuse("tokens", f"token ids are integers from 0 to {text.vocab_size - 1}", "out_of_range")
    return {"prompt": text.decode_whole(tokens)}


def tokenizer_info(text: TextCodec) -> dict[str, Any]:
    """The tokenizer's special tokens and chat template."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", **text.info}


def _ids(fields: Fields, settings: IngressSettings, text: TextCodec) -> list[int]:
    prompt = fields.raw("prompt")
    if (prompt is None) == (fields.raw("messages") is None):
        raise RequestError("prompt: give either 'prompt' or 'messages'", field="prompt")
    if prompt is None:
        return encode_messages(fields, settings, text, read_tools(fields, settings, text).shown)
    if not isinstance(prompt, str):
        raise fields.refuse("prompt", f"must be a string, not {shown(prompt)}", "invalid_type")
    fields.text("prompt", settings.limits.max_tokenize_bytes)
    read_variables(fields, settings, text)  # these three say nothing of a prompt, but may not be wrong
    read_continuation(fields)
    check_tools(fields, settings)
    return text.encode(prompt, "prompt", fields.boolean("add_special_tokens", default=True))
