"""A model directory's `config.json` as one checked, frozen value.

Read by `loading.py` and `decoder.py` here, by `workers/runner.py`, and by `cluster/` for context length, vocabulary and
dtype (it needs no torch). Accepts what transformers 4 and 5 write for the architectures in `FAMILIES`; anything that
would change the arithmetic and is not implemented is refused with the key's name, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.workers.errors import ModelError
from penstock.workers.model.expert_layers import ExpertLayers, read_experts
from penstock.workers.model.families import FAMILIES, Family
from penstock.workers.model.fields import FieldReader
from penstock.workers.model.group_limited import read_group_limited
from penstock.workers.model.latent_fields import LatentShape, latent_heads, latent_scale, read_latent
from penstock.workers.model.layer_windows import layer_windows
from penstock.workers.model.rope_fields import Rope, read_ropes

MAX_CONFIG_BYTES = 4 << 20
DTYPES = ("float32", "bfloat16", "float16")
# config.json's name -> ours
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that decides the shapes and the arithmetic of one decoder."""

    architecture: str
    dtype: str  # of the checkpoint; one of DTYPES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense layers
    num_layers: int
    num_heads: int
    num_kv_heads: int  # 1 with `latent`: the row that all heads share
    head_dim: int  # with `latent`, of the rotated part
    max_positions: int
    rope: Rope  # of all layers, or of the full ones where `local_rope` is given
    local_rope: Rope | None  # of the layers with a window
    windows: tuple[int, ...]  # per layer, the tokens that a query attends to; 0 = all
    attention_scale: float
    attention_cap: float  # scores are soft-capped at it; 0 = not
    logit_cap: float  # so are logits
    rms_eps: float
    norm_offset: float  # added to every stored norm weight
    qk_norm: bool  # queries and keys are normalised head by head
    post_norms: bool  # the outputs of attention and feed-forward block are normalised
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str  # of the gate; one of ACTIVATIONS' values
    embedding_scale: float
    tied_embeddings: bool
    experts: ExpertLayers | None  # None: all layers are dense
    latent: LatentShape | None = None  # None: attention keeps keys and values


def read_config(model_dir: Path) -> DecoderConfig:
    """Read `config.json`. Raises ModelError naming file and key."""
    return parse_config(read_raw_config(model_dir), str(model_dir / "config.json"))


def read_raw_config(model_dir: Path) -> dict[str, Any]:
    """`config.json` as it stands there. Raises ModelError naming the file."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such model directory", str(model_dir))
    path = model_dir / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes", str(path))
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", str(path)) from error
    return parse_raw_config(text, str(path))


def parse_raw_config(text: bytes, path: str) -> dict[str, Any]:
    """The same of its bytes, wherever they are from."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", path) from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: the top level must be an object", path)
    return raw


def parse_config(raw: dict[str, Any], path: str) -> DecoderConfig:
    """Check the decoded JSON; `path` is for messages. Raises ModelError naming file and key."""
    fields = FieldReader(raw, path)
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    _refuse_unsupported(fields, family)
    hidden, latent = fields.integer("hidden_size", 1, 1 << 17), read_latent(fields, family)
    heads, kv_heads, head_dim = _heads(fields, family) if latent is None else latent_heads(fields, latent)
    num_layers = fields.integer("num_hidden_layers", 1, 1 << 10)
    max_positions = fields.integer("max_position_embeddings", 1, 1 << 26)
    rope, local_rope = read_ropes(fields, family, max_positions)
    qkv_bias, output_bias = _attention_biases(fields, family)
    return DecoderConfig(
        architecture=architecture,
        dtype=_dtype(fields),
        vocab_size=fields.integer("vocab_size", 1, 1 << 24),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rope=rope,
        local_rope=local_rope,
        windows=layer_windows(fields, family, num_layers),
        attention_scale=_attention_scale(fields, family, head_dim) if latent is None else latent_scale(fields, latent),
        attention_cap=_cap(fields, "attn_logit_softcapping", family.attention_cap) if family.gemma else 0.0,
        logit_cap=_cap(fields, "final_logit_softcapping", family.logit_cap) if family.gemma else 0.0,
        rms_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=family.rms_eps),
        norm_offset=1.0 if family.gemma else 0.0,
        qk_norm=family.qk_norm,
        post_norms=family.gemma,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=fields.boolean("mlp_bias", default=False),
        activation=_activation(fields, family),
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=family.tied_embeddings),
        experts=_experts(fields, family, num_layers),
        latent=latent,
    )


def is_native(raw_config: dict[str, Any]) -> bool:
    """Whether our own decoder runs this model exactly: its architecture and every feature that its config asks for."""
    try:
        parse_config(raw_config, "config.json")
    except ModelError:
        return False
    return True


def _architecture(fields: FieldReader) -> str:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise fields.error("architectures", "missing; expected a list with one of " + ", ".join(FAMILIES))
    for name in names:
        if name in FAMILIES:
            return str(name)
    raise fields.error("architectures", f"{names[0]!r} is not supported; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(fields: FieldReader, family: Family) -> None:
    raw = fields.raw
    if raw.get("auto_map") is not None and not _superseded(raw["auto_map"], family):
        raise fields.error("auto_map", "model directories with their own code are not run")
    if raw.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised checkpoints are not supported")
    if raw.get("mlp_bias") and not family.mlp_bias:
        raise fields.error("mlp_bias", "this architecture has none")
    if raw.get("attention_bias") and family.qkv_bias is False:
        raise fields.error("attention_bias", "this architecture has none")
    if family.gemma and not family.attention_cap_heeded and raw.get("attn_logit_softcapping") is not None:
        raise fields.error("attn_logit_softcapping", "not supported with this architecture")


def _superseded(auto_map: object, family: Family) -> bool:
    """Whether all code that the directory brings along is what the architecture has been defined by since."""
    if not isinstance(auto_map, dict) or not family.superseded_code:
        return False
    return all(isinstance(name, str) and name.split(".")[0] in family.superseded_code for name in auto_map.values())


def _heads(fields: FieldReader, family: Family) -> tuple[int, int, int]:
    """(query heads, key and value heads, size of one)."""
    hidden, heads = fields.integer("hidden_size", 1, 1 << 17), fields.integer("num_attention_heads", 1, 1 << 10)
    kv_heads = fields.integer("num_key_value_heads", 1, 1 << 10, default=heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if fields.raw.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise fields.error("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", 2, 1 << 10, default=family.head_dim or hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs an even size")
    return heads, kv_heads, head_dim


def _attention_biases(fields: FieldReader, family: Family) -> tuple[bool, bool]:
    """(of query, key and value, of the output projection)."""
    if family.qkv_bias is None:
        both = fields.boolean("attention_bias", default=False)
        return both, both
    if family.qkv_bias_key is not None:
        return fields.boolean(family.qkv_bias_key, default=family.qkv_bias), False
    return family.qkv_bias, False


def _experts(fields: FieldReader, family: Family, num_layers: int) -> ExpertLayers | None:
    how = family.experts
    if how is None or how.group_limited is None:
        return read_experts(fields, family, num_layers)
    mlp_bias = fields.boolean("mlp_bias", default=False)
    return read_group_limited(fields, how, how.group_limited, num_layers, mlp_bias)


def _attention_scale(fields: FieldReader, family: Family, head_dim: int) -> float:
    width = fields.number("query_pre_attn_scalar", 1e-3, 1e6, default=256) if family.gemma else float(head_dim)
    return float(width**-0.5)


def _cap(fields: FieldReader, key: str, default: float | None) -> float:
    """The soft cap, or 0 where there is none; null says none, and a missing key the family's default."""
    return fields.optional_number(key, 1e-3, 1e9, default=default) or 0.0


def _activation(fields: FieldReader, family: Family) -> str:
    name = fields.raw.get(family.activation_key)
    if name is None:
        name = family.activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        supported = ", ".join(ACTIVATIONS)
        raise fields.error(family.activation_key, f"{name!r} is not supported; supported are {supported}")
    return ACTIVATIONS[name]


def _dtype(fields: FieldReader) -> str:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = fields.raw.get(key)
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise fields.error(key, f"{name!r} is not supported; supported are {', '.join(DTYPES)}")
    return str(name)
