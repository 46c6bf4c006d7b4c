"""Which code runs a model: our own decoder where it can, else transformers' module behind our paged attention.

Used by `workers/runner.py` to load and, without torch, by `cluster/model_directory.py` to describe the same model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import ConfigError, ModelError
from penstock.workers.model.config import DecoderConfig, parse_config
from penstock.workers.model.families import FAMILIES
from penstock.workers.model.foreign_config import ForeignConfig, parse_foreign_config

IMPLEMENTATIONS = ("auto", "penstock", "transformers")


@dataclass(frozen=True, slots=True)
class Implementation:
    """The configuration as the chosen code reads it, and why it was chosen."""

    config: DecoderConfig | ForeignConfig
    reason: str

    @property
    def length_key(self) -> str:
        """The key of `config.json` that limits the context."""
        return self.config.length_key if isinstance(self.config, ForeignConfig) else "max_position_embeddings"


def choose_implementation(wanted: str, raw_config: dict[str, Any], path: str) -> Implementation:
    """`wanted` is one of `IMPLEMENTATIONS`; `path` names config.json in messages. Raises ModelError and ConfigError."""
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(f"{wanted!r} is not one of {', '.join(IMPLEMENTATIONS)}", key="runner.model_impl")
    if wanted == "transformers":
        return Implementation(parse_foreign_config(raw_config, path), "asked for")
    try:
        native = parse_config(raw_config, path)
    except ModelError as error:
        if wanted == "penstock":
            raise
        foreign = parse_foreign_config(raw_config, path)
        unknown = foreign.architecture not in FAMILIES
        reason = f"{foreign.architecture} is none of our own decoders" if unknown else f"our own decoder: {error}"
        return Implementation(foreign, reason)
    reason = "asked for" if wanted == "penstock" else f"{native.architecture} is one of our own"
    return Implementation(native, reason)
