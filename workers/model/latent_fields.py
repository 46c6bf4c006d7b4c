"""The sizes and the scale of latent attention from config.json: DeepSeek's families keep one narrow row per token.

Called by `config.py`; `latent_attention.py`, `latent_loading.py` and `model_build.py` read the result. Knows no files
and no tensors. Defaults are those of transformers, as in `families.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.workers.model.families import Family
from penstock.workers.model.fields import FieldReader

NORM_EPS = 1e-6  # of the norms inside attention, whatever `rms_norm_eps` says
MOST_RANK = 1 << 14
MOST_HEAD = 1 << 10
MOST_STORED = 1024  # what `ops.latent_attention` takes


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Widths of what a token's hidden state is projected to (DeepSeek-V2, 2024, section 2.1)."""

    query_rank: int | None  # of the query's own latent; None: queries are projected at once
    kv_rank: int  # of the latent that keys and values are made of
    plain_dim: int  # of a head's query and key, without position
    rope_dim: int  # of a head's query and of the one key that all heads share, rotated
    value_dim: int  # of a head's value
    interleaved: bool  # which numbers of the rotated part are pairs

    @property
    def query_dim(self) -> int:
        """Of one head's query."""
        return self.plain_dim + self.rope_dim

    @property
    def stored_dim(self) -> int:
        """Of the row that one token keeps in each layer."""
        return self.kv_rank + self.rope_dim


def read_latent(fields: FieldReader, family: Family) -> LatentShape | None:
    """None where the family keeps keys and values. Raises ModelError naming the key."""
    how = family.latent
    if how is None:
        return None
    rope_dim = fields.integer("qk_rope_head_dim", 2, MOST_HEAD, default=64)
    if rope_dim % 2:
        raise fields.error("qk_rope_head_dim", f"{rope_dim} is odd; rotary embedding needs an even size")
    shape = LatentShape(
        query_rank=fields.optional_integer("q_lora_rank", 1, MOST_RANK, default=1536),
        kv_rank=fields.integer("kv_lora_rank", 1, MOST_RANK, default=512),
        plain_dim=fields.integer("qk_nope_head_dim", 1, MOST_HEAD, default=128),
        rope_dim=rope_dim,
        value_dim=fields.integer("v_head_dim", 1, MOST_HEAD, default=128),
        interleaved=how.interleave_key is None or fields.boolean(how.interleave_key, default=True),
    )
    if shape.stored_dim > MOST_STORED:
        raise fields.error(
            "kv_lora_rank", f"{shape.kv_rank} and {rope_dim} rotated numbers are more than the {MOST_STORED} supported"
        )
    return shape


def latent_heads(fields: FieldReader, shape: LatentShape) -> tuple[int, int, int]:
    """(query heads, stored rows that stand for kv heads, numbers that are rotated)."""
    heads = fields.integer("num_attention_heads", 1, 1 << 10)
    kv_heads = fields.integer("num_key_value_heads", 1, 1 << 10, default=heads)
    if kv_heads != heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} is not num_attention_heads {heads}, as latents need it")
    return heads, 1, shape.rope_dim


def latent_scale(fields: FieldReader, shape: LatentShape) -> float:
    """Of the scores: 1 / sqrt(query size), times YaRN's temperature squared where `mscale_all_dim` asks for it.

    The temperature is 0.1 mscale_all_dim ln(factor) + 1 (Peng et al. 2023, section 3.4).
    """
    scale = float(shape.query_dim**-0.5)
    key = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    if not fields.raw.get(key):
        return scale
    section = fields.section(key)
    mscale = section.optional_number("mscale_all_dim", 0.0, 1e6)
    if section.raw.get("rope_type", section.raw.get("type", "default")) == "default" or not mscale:
        return scale
    factor = section.number("factor", 1.0, 1e6)
    temperature = 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
    return scale * temperature * temperature
