"""A model directory's `config.json` as one checked, frozen value.

Read by `loading.py` and `decoder.py` here, by `workers/runner.py`, and by `cluster/` for context length, vocabulary and
dtype (it needs no torch). Accepts what transformers 4 and 5 write for the families in `FAMILIES`; anything that would
change the arithmetic and is not implemented is refused with the key's name, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.workers.errors import ModelError
from penstock.workers.model.fields import FieldReader

MAX_CONFIG_BYTES = 4 << 20
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one `architectures` entry from the plain Llama decoder."""

    qk_norm: bool = False  # RMS norm over each query and key head before the rotation
    default_theta: float = 10000.0


FAMILIES = {"LlamaForCausalLM": Family(), "Qwen3ForCausalLM": Family(qk_norm=True)}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Change of the rotary frequencies for longer contexts; `kind` is `linear` or `llama3` (Llama 3.1)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that decides the shapes and the arithmetic of one decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint; one of DTYPES

    @property
    def qk_norm(self) -> bool:
        """Whether query and key heads are normalised (Qwen3)."""
        return FAMILIES[self.architecture].qk_norm


def read_config(model_dir: Path) -> DecoderConfig:
    """Read `config.json`. Raises ModelError naming file and key."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such model directory", str(model_dir))
    path = model_dir / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes", str(path))
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", str(path)) from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: the top level must be an object", str(path))
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], path: str) -> DecoderConfig:
    """Check the decoded JSON; `path` is for messages. Raises ModelError naming file and key."""
    fields = FieldReader(raw, path)
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden, heads = fields.integer("hidden_size", 1, 1 << 17), fields.integer("num_attention_heads", 1, 1 << 10)
    kv_heads = fields.integer("num_key_value_heads", 1, 1 << 10, default=heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise fields.error("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", 2, 1 << 10, default=hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs an even size")
    theta, scaling = _rope(fields, FAMILIES[architecture])
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", 1, 1 << 24),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_layers=fields.integer("num_hidden_layers", 1, 1 << 10),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=fields.integer("max_position_embeddings", 1, 1 << 26),
        tied_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=fields.boolean("attention_bias", default=False),
        mlp_bias=fields.boolean("mlp_bias", default=False),
        dtype=_dtype(fields),
    )


def _architecture(fields: FieldReader) -> str:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise fields.error("architectures", "missing; expected a list with one of " + ", ".join(FAMILIES))
    for name in names:
        if name in FAMILIES:
            return str(name)
    raise fields.error("architectures", f"{names[0]!r} is not supported; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(fields: FieldReader) -> None:
    if fields.raw.get("auto_map") is not None:
        raise fields.error("auto_map", "model directories with their own code are not run")
    if fields.raw.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised checkpoints are not supported")
    if fields.raw.get("use_sliding_window"):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported")
    layers = fields.raw.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        raise fields.error("layer_types", "only full_attention layers are supported")
    if fields.raw.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", f"{fields.raw['hidden_act']!r} is not supported; supported is silu")


def _rope(fields: FieldReader, family: Family) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from transformers 5's `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    if fields.raw.get("rope_parameters") is not None:
        key, outer = "rope_parameters", fields.section("rope_parameters")
        theta = outer.number("rope_theta", 1.0, 1e12, default=family.default_theta)
    else:
        theta = fields.number("rope_theta", 1.0, 1e12, default=family.default_theta)
        if fields.raw.get("rope_scaling") is None:
            return theta, None
        key, outer = "rope_scaling", fields.section("rope_scaling")
    kind = outer.raw.get("rope_type", outer.raw.get("type", "default"))
    if outer.raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error(f"{key}.partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, outer.number("factor", 1.0, 1e6))
    if kind == "llama3":
        return theta, _llama3(fields, outer, key)
    raise fields.error(f"{key}.rope_type", f"{kind!r} is not supported; supported are default, linear, llama3")


def _llama3(fields: FieldReader, outer: FieldReader, key: str) -> RopeScaling:
    low, high = outer.number("low_freq_factor", 1e-3, 1e6), outer.number("high_freq_factor", 1e-3, 1e6)
    if low >= high:
        raise fields.error(f"{key}.high_freq_factor", f"{high} must be above low_freq_factor {low}")
    positions = outer.integer("original_max_position_embeddings", 1, 1 << 26)
    return RopeScaling("llama3", outer.number("factor", 1.0, 1e6), low, high, positions)


def _dtype(fields: FieldReader) -> str:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = fields.raw.get(key)
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise fields.error(key, f"{name!r} is not supported; supported are {', '.join(DTYPES)}")
    return str(name)
