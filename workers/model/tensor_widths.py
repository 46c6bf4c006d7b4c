"""Whether a model can be cut for a tensor-parallel group of some width, from its configuration alone.

Called before a load by `workers/model_build.py`, and by `cluster/` before it starts anything; needs no torch.
"""

from __future__ import annotations

from penstock.workers.errors import ConfigError
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.foreign_config import ForeignConfig
from penstock.workers.parallel.shards import KEY, Widths, require_width


def require_tensor_width(config: DecoderConfig | ForeignConfig, width: int) -> None:
    """Raises ConfigError with the numbers, and the widths that fit, unless `width` ranks can share this model."""
    if isinstance(config, DecoderConfig):
        require_width(decoder_widths(config), width)
    elif width != 1:
        raise ConfigError(
            f"{KEY} {width}: {config.architecture} runs by the transformers backend, which has one rank; its layers "
            "are not ours to cut",
            key=KEY,
        )


def decoder_widths(config: DecoderConfig) -> Widths:
    """The sizes of one of our own decoders that a group divides."""
    columns, how = [], config.experts
    if how is None or not all(how.layers):
        columns.append(("the dense feed-forward block", config.intermediate_size))
    if how is not None:
        columns.append(("an expert", how.width))
        if how.shared_width:
            columns.append(("the shared expert", how.shared_width))
    # Latent rows are whole on every rank, like a single key head that all repeat.
    return Widths(config.num_heads, 1 if config.latent is not None else config.num_kv_heads, tuple(columns))
