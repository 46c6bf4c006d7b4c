"""Which layers of a model attend to a window only, from the several ways in which config.json says so.

Called by `config.py`. Knows no files and no tensors.
"""

from __future__ import annotations

from penstock.workers.model.families import Family, Sliding
from penstock.workers.model.fields import FieldReader

FULL, SLIDING = "full_attention", "sliding_attention"
MOST_TOKENS = 1 << 26


def layer_windows(fields: FieldReader, family: Family, num_layers: int) -> tuple[int, ...]:
    """Tokens that each layer's queries attend to, themselves included; 0 = all. Raises ModelError naming the key.

    `layer_types` decides where it is given; the family's own rule does where it is not, as in older checkpoints.
    """
    if fields.raw.get("use_bidirectional_attention"):
        raise fields.error("use_bidirectional_attention", "only causal attention is supported")
    if fields.raw.get("use_sliding_window") and family.sliding not in (Sliding.SWITCHED, Sliding.UPPER):
        raise fields.error("use_sliding_window", "not supported with this architecture")
    window, kinds = _window(fields, family), _kinds(fields, num_layers)
    ruled = _ruled(fields, family, window, num_layers)
    if kinds is None:
        kinds = ruled
    elif family.sliding in (Sliding.NEVER, Sliding.ALWAYS, Sliding.SWITCHED) and kinds != ruled:
        raise fields.error("layer_types", f"only {ruled[0]} layers are supported with this architecture and window")
    if SLIDING in kinds and window is None:
        raise fields.error("layer_types", f"has {SLIDING} layers, but no window is switched on")
    return tuple(window or 0 if kind == SLIDING else 0 for kind in kinds)


def _window(fields: FieldReader, family: Family) -> int | None:
    """Tokens, or None where no layer has a window."""
    if family.sliding is Sliding.NEVER:
        return None
    switched = family.sliding in (Sliding.SWITCHED, Sliding.UPPER)
    if switched and not fields.boolean("use_sliding_window", default=False):
        return None
    return fields.optional_integer("sliding_window", 1, MOST_TOKENS, default=family.window)


def _kinds(fields: FieldReader, num_layers: int) -> list[str] | None:
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must be a list of {num_layers} names, one for each layer")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise fields.error("layer_types", f"{kind!r} is not supported; supported are {FULL}, {SLIDING}")
    return kinds


def _ruled(fields: FieldReader, family: Family, window: int | None, num_layers: int) -> list[str]:
    """The kinds of the layers where `layer_types` does not say them."""
    if family.sliding is Sliding.PATTERN:
        every = family.full_every
        if family.full_every_key is not None:
            every = fields.integer(family.full_every_key, 1, 1 << 10, default=every)
        return [SLIDING if (number + 1) % every else FULL for number in range(num_layers)]
    if window is None:
        return [FULL] * num_layers
    first = fields.integer("max_window_layers", 0, 1 << 10, default=28) if family.sliding is Sliding.UPPER else 0
    return [SLIDING if number >= first else FULL for number in range(num_layers)]
