"""PEFT's `adapter_config.json` as one checked value: ranks, scales, and nothing that would be served wrongly.

Used by `adapter_files.py`. Fields that would change the arithmetic and are not implemented are refused by name, never
ignored. Needs no torch. Source of the fields: PEFT's LoraConfig; scale alpha / r, with rsLoRA alpha / sqrt(r)
(Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import AdapterError, ModelError
from penstock.workers.model.config import parse_raw_config

_PATTERN_KEY = re.compile(r"[A-Za-z0-9_.]{1,200}\Z")
_MAX_PATTERNS = 4096
_MAX_ALPHA = 1e6
# Fields whose presence with another value than these means another arithmetic.
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "target_parameters": ([],),
    "arrow_config": (),
    "corda_config": ({},),
    "eva_config": ({},),
    "loftq_config": ({},),
}
# Ways to begin training that also change the model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_Wrong = Callable[[str, str], AdapterError]  # of a key, and why


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Rank and alpha of every target: the stated ones, or those of the pattern that it ends with."""

    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, target: str) -> tuple[int, float]:
        """Rank and alpha of a module like `layers.3.self_attn.q_proj`."""
        return _found(self.ranks, target, self.rank), _found(self.alphas, target, self.alpha)


def parse_adapter_config(text: bytes, where: str, max_rank: int) -> AdapterConfig:
    """Check the file's bytes. Raises AdapterError naming file and key."""

    def wrong(key: str, why: str) -> AdapterError:
        return AdapterError(f"{where}: {key!r}: {why}")

    try:
        raw = parse_raw_config(text, where)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    if raw.get("peft_type", "LORA") != "LORA":
        raise wrong("peft_type", f"{raw['peft_type']!s:.40} is not LORA")
    for key, harmless in _HARMLESS.items():
        if raw.get(key) is not None and raw[key] not in harmless:
            raise wrong(key, "adapters with this are not served")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise wrong(
            "init_lora_weights", f"{start[:40]} changes the model's own weights; save the adapter as plain LoRA"
        )
    stabilised = raw.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise wrong("use_rslora", "must be true or false")
    ranks = {key: _rank(wrong, "rank_pattern", value, max_rank) for key, value in _pattern(wrong, raw, "rank_pattern")}
    alphas = {key: _alpha(wrong, "alpha_pattern", value) for key, value in _pattern(wrong, raw, "alpha_pattern")}
    rank = _rank(wrong, "r", raw.get("r"), max_rank)
    return AdapterConfig(rank, _alpha(wrong, "lora_alpha", raw.get("lora_alpha", 8)), stabilised, ranks, alphas)


def _found(patterns: Mapping[str, Any], target: str, otherwise: Any) -> Any:
    """The first pattern that is the target, or its end from a dot on."""
    return next((value for key, value in patterns.items() if f".{target}".endswith(f".{key}")), otherwise)


def _rank(wrong: _Wrong, key: str, value: object, most: int) -> int:
    if type(value) is not int or value < 1:
        raise wrong(key, "a rank must be a whole number above 0")
    if value > most:
        raise wrong(key, f"rank {value} is above adapters.max_rank {most}")
    return value


def _alpha(wrong: _Wrong, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(key, "must be a number")
    if not 0 <= value <= _MAX_ALPHA:
        raise wrong(key, f"must lie between 0 and {_MAX_ALPHA:g}")
    return float(value)


def _pattern(wrong: _Wrong, raw: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise wrong(name, "must be an object of names and numbers")
    for key in patterns:
        if not _PATTERN_KEY.match(key):
            raise wrong(name, f"{key!r:.80} is not the plain name of a module; regular expressions are not served")
    return list(patterns.items())
