"""Rotary embedding as config.json asks for it, in the forms that transformers 4 and 5 write.

Called by `config.py`; `rope.py` makes the tables. Knows no files and no tensors. The order in which keys override each
other is that of transformers 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.model.families import Family
from penstock.workers.model.fields import FieldReader
from penstock.workers.model.layer_windows import FULL, SLIDING

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_LOCAL_THETA = 10000.0
DEFAULT_GLOBAL_THETA = 1000000.0  # of the full layers where sliding layers have their own
MOST_POSITIONS = 1 << 26


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Change of the rotary frequencies for longer contexts; `kind` is `linear`, `llama3` (Llama 3.1) or `yarn`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 0
    attention_factor: float | None = None  # yarn: of cosine and sine; None: from the next two or `factor`
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0  # yarn: rotations over the original positions above which a frequency is kept
    beta_slow: float = 1.0  # ... and below which it is stretched by `factor`
    truncate: bool = True  # yarn: the bounds between are rounded to whole dimensions


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary embedding."""

    theta: float
    scaling: RopeScaling | None = None


def read_ropes(fields: FieldReader, family: Family, max_positions: int) -> tuple[Rope, Rope | None]:
    """(of all layers or the full ones, of sliding layers where they have their own). Raises ModelError."""
    if fields.raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    if family.local_rope:
        return _read_two(fields, max_positions)
    theta = fields.number("rope_theta", 1.0, 1e12, default=family.rope_theta)
    key = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    if not fields.raw.get(key):
        return Rope(theta), None
    section = fields.section(key)
    for kind in (FULL, SLIDING):
        if kind in section.raw:
            raise section.error(kind, "this architecture has one rotary embedding for all layers")
    original = fields.optional_integer("original_max_position_embeddings", 1, MOST_POSITIONS, default=None)
    return _read_one(section, theta, max_positions, original), None


def _read_two(fields: FieldReader, max_positions: int) -> tuple[Rope, Rope]:
    """Gemma 3: `rope_parameters` has one section per kind of layer; older files scale only the full layers."""
    theta = fields.number("rope_theta", 1.0, 1e12, default=DEFAULT_GLOBAL_THETA)
    local_theta = fields.number("rope_local_base_freq", 1.0, 1e12, default=DEFAULT_LOCAL_THETA)
    found = {}
    if fields.raw.get("rope_parameters") is not None:
        both = fields.section("rope_parameters")
        for key in both.raw:
            if key not in (FULL, SLIDING):
                raise both.error(key, f"expected only {FULL} and {SLIDING}, with one rotary embedding each")
        found = {kind: both.section(kind) for kind in (FULL, SLIDING) if both.raw.get(kind) is not None}
    if fields.raw.get("rope_scaling"):
        if found:
            raise fields.error("rope_scaling", "given together with rope_parameters")
        found = {FULL: fields.section("rope_scaling")}
    for section in found.values():
        if "rope_type" not in section.raw and "type" in section.raw:
            raise section.error("type", "must be called rope_type with this architecture")
        if section.raw.get("truncate", True) is not True:
            raise section.error("truncate", "only true is supported with this architecture")
    full, local = (
        _read_one(found[kind], base, max_positions, None) if kind in found else Rope(base)
        for kind, base in ((FULL, theta), (SLIDING, local_theta))
    )
    return full, local


def _read_one(section: FieldReader, theta: float, max_positions: int, original: int | None) -> Rope:
    """`theta` is for a section that has none; `original` overrides the section's own original positions."""
    if section.raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise section.error("partial_rotary_factor", "only 1.0 is supported")
    theta = section.number("rope_theta", 1.0, 1e12, default=theta)
    kind = section.raw.get("rope_type", section.raw.get("type", "default"))
    if kind not in KINDS:
        raise section.error("rope_type", f"{kind!r} is not supported; supported are {', '.join(KINDS)}")
    if kind == "default":
        return Rope(theta)
    if kind == "yarn" and section.raw.get("factor") is None:
        positions = original or _original_positions(section, max_positions)
        return Rope(theta, _yarn(section, max_positions / positions, positions))
    factor = section.number("factor", 1.0, 1e6)
    if kind == "dynamic":  # changes nothing up to `max_position_embeddings`, and no worker goes beyond
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, RopeScaling(kind, factor))
    positions = original or _original_positions(section, max_positions)
    return Rope(theta, (_llama3 if kind == "llama3" else _yarn)(section, factor, positions))


def _original_positions(section: FieldReader, max_positions: int) -> int:
    return section.integer("original_max_position_embeddings", 1, MOST_POSITIONS, default=max_positions)


def _llama3(section: FieldReader, factor: float, positions: int) -> RopeScaling:
    low, high = section.number("low_freq_factor", 1e-3, 1e6), section.number("high_freq_factor", 1e-3, 1e6)
    if low >= high:
        raise section.error("high_freq_factor", f"{high} must be above low_freq_factor {low}")
    return RopeScaling("llama3", factor, low, high, positions)


def _yarn(section: FieldReader, factor: float, positions: int) -> RopeScaling:
    return RopeScaling(
        "yarn",
        factor,
        original_positions=positions,
        attention_factor=section.optional_number("attention_factor", 0.0, 1e6),
        mscale=section.optional_number("mscale", 0.0, 1e6),
        mscale_all_dim=section.optional_number("mscale_all_dim", 0.0, 1e6),
        beta_fast=section.number("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
        truncate=section.boolean("truncate", default=True),
    )
