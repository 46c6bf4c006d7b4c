"""Which of a decoder's projections an adapter may change, with their sizes. Needs no torch.

Used by `adapter_files.py`, which checks files against it, and by `bank.py`, which makes room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.errors import ConfigError
from penstock.workers.model.config import DecoderConfig

KEY = "adapters.directory"
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FEED_FORWARD
Place = tuple[int, str]  # (layer, projection)


@dataclass(frozen=True, slots=True)
class Size:
    """Of one projection, as the checkpoint has it."""

    inputs: int
    outputs: int


def adaptable(config: DecoderConfig) -> dict[Place, Size]:
    """All projections that adapters of this model may change: those of attention and of dense feed-forward blocks.

    Raises ConfigError for a model whose adapters are not served.
    """
    if config.latent is not None:
        raise ConfigError(f"{config.architecture}: adapters of models with latent attention are not served", KEY)
    hidden, width = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {
        "q_proj": Size(hidden, heads),
        "k_proj": Size(hidden, kv_heads),
        "v_proj": Size(hidden, kv_heads),
        "o_proj": Size(heads, hidden),
    }
    dense = {"gate_proj": Size(hidden, width), "up_proj": Size(hidden, width), "down_proj": Size(width, hidden)}
    places: dict[Place, Size] = {}
    for layer in range(config.num_layers):
        has_experts = config.experts is not None and config.experts.layers[layer]
        places |= {(layer, name): size for name, size in (attention if has_experts else attention | dense).items()}
    return places
