"""What can be read of a `config.json` whose architecture we did not write, and what of it is refused unread.

Used by `transformers_loading.py` and, without torch, by `cluster/model_directory.py` for context length, vocabulary and
dtype. The sizes of heads and layers are not read here: config names differ between families, so
`transformers_probe.py` learns them from the module itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.workers.model.config import DTYPES
from penstock.workers.model.fields import FieldReader

# In this order: a configuration that states two of them means the first.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
REFUSED_KEYS = {
    "auto_map": "model directories with their own code are not run",
    "quantization_config": "quantised checkpoints are not supported",
    "is_encoder_decoder": "encoder-decoder models are not supported",
    "add_cross_attention": "cross attention is not supported",
    "alibi": "ALiBi attention is not supported: paged attention takes no position bias",
    "use_bidirectional_attention": "attention that is not causal is not supported",
}
STATE_KEYS = ("state_size", "ssm_state_size", "ssm_cfg", "mamba_d_state", "linear_conv_kernel_dim")
NESTED_KEYS = ("text_config", "vision_config", "audio_config", "speech_config", "encoder", "decoder", "llm_config")


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """The few facts that the front and the loader need in advance."""

    architecture: str
    vocab_size: int
    max_positions: int
    length_key: str  # the key that says so
    dtype: str  # of the checkpoint; one of DTYPES


def parse_foreign_config(raw: dict[str, Any], path: str) -> ForeignConfig:
    """Check the decoded JSON; `path` is for messages. Raises ModelError naming file and key."""
    fields = FieldReader(raw, path)
    architecture = _architecture(fields)
    for key, reason in REFUSED_KEYS.items():
        if raw.get(key):
            raise fields.error(key, reason)
    for key in STATE_KEYS:
        if fields.raw.get(key) is not None:
            raise fields.error(key, f"{architecture} has recurrent layers, which keep no KV blocks: not supported")
    for key in NESTED_KEYS:
        if isinstance(raw.get(key), dict):
            raise fields.error(key, "models of several parts (vision, audio, encoder) are not supported")
    max_positions, length_key = _context(fields)
    return ForeignConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", 1, 1 << 24),
        max_positions=max_positions,
        length_key=length_key,
        dtype=_dtype(fields),
    )


def _architecture(fields: FieldReader) -> str:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0].isidentifier():
        raise fields.error("architectures", "missing; expected a list with one class name, such as GPTNeoXForCausalLM")
    return names[0]


def _context(fields: FieldReader) -> tuple[int, str]:
    """(tokens, key). LongRoPE stays below its switch to long factors, which is made for whole sequences at once."""
    stated = [key for key in LENGTH_KEYS if fields.raw.get(key) is not None]
    if not stated:
        raise fields.error(LENGTH_KEYS[0], f"missing, as are {', '.join(LENGTH_KEYS[1:])}")
    key = stated[0]
    limit = fields.integer(key, 1, 1 << 26)
    for rope in _rope_sections(fields.raw):
        original = rope.get("original_max_position_embeddings", fields.raw.get("original_max_position_embeddings"))
        kind = rope.get("rope_type", rope.get("type"))
        if kind in ("longrope", "su") and isinstance(original, int) and 0 < original < limit:
            limit, key = original, "original_max_position_embeddings"
    return limit, key


def _rope_sections(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The rope settings, of which some models have one per kind of layer."""
    found = [raw[key] for key in ("rope_parameters", "rope_scaling") if isinstance(raw.get(key), dict)]
    return found + [inner for outer in found for inner in outer.values() if isinstance(inner, dict)]


def _dtype(fields: FieldReader) -> str:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = fields.raw.get(key)
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise fields.error(key, f"{name!r} is not supported; supported are {', '.join(DTYPES)}")
    return str(name)
