"""A `StepPlan` as bytes and back: one fixed list of columns, their sizes first, then their contents as they lie.

Used by `step_channel.py` once per step on every rank of a group, so it makes no object per row. It knows what a plan
is made of, not what it means to a runner. Layout, little-endian:

    head      step, numbers of rows that decode and that go on, flags (optional parts, `follows`), number of columns
    sizes     uint32 per column: its length in units of 4 bytes; then the width of the block tables
    contents  the columns one after the other, those of 8 bytes first, so that every one is aligned

Nothing is allocated for a plan whose sizes do not add up to its bytes; columns of a read plan are views of them.
"""

from __future__ import annotations

import operator
import struct
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from penstock.workers.errors import WireError
from penstock.workers.scheduler.plan import I32, LogitEdits, SamplingBatch, ScoredPrompt, StepPlan

MAX_PLAN_BYTES = 64 << 20
_HEAD = struct.Struct("<QIIHH4x")
_EDITS, _SCORED, _FOLLOWS = 1, 2, 4

_I4, _F4, _U8 = (np.dtype(code) for code in ("<i4", "<f4", "<u8"))
_SAMPLING = ("seed", "temperature", "top_k", "top_p", "min_p", "choice", "position", "logprobs")
_PLAN = ("slots", "starts", "offsets", "token_ids", "block_tables", "sample_rows", "copies", "embed_rows", "adapters")
_ROWS = len(_SAMPLING)  # places of columns in a plan, here of `slots`
_TABLE, _COPIES, _ADAPTERS = (_ROWS + _PLAN.index(name) for name in ("block_tables", "copies", "adapters"))
_EDIT_COLUMNS = tuple(field.name for field in fields(LogitEdits))
_MASKED_ROWS, _MASKS = _EDIT_COLUMNS.index("masked_rows"), _EDIT_COLUMNS.index("masks")
_SCORED_COLUMNS = tuple(field.name for field in fields(ScoredPrompt))
_SAMPLING_OF, _PLAN_OF = operator.attrgetter(*_SAMPLING), operator.attrgetter(*_PLAN)
_EDITS_OF, _SCORED_OF = operator.attrgetter(*_EDIT_COLUMNS), operator.attrgetter(*_SCORED_COLUMNS)
_FLOATS = frozenset({"temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias_values"})


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a plan with these optional parts consists of, in order."""

    kinds: tuple[np.dtype[Any], ...]
    floats: tuple[bool, ...]
    sizes: struct.Struct  # one per column, the width of the block tables, and what makes the contents begin on 8 bytes

    @staticmethod
    def of(flags: int) -> _Parts:
        names: tuple[str, ...] = _SAMPLING + _PLAN
        names += (_EDIT_COLUMNS if flags & _EDITS else ()) + (_SCORED_COLUMNS if flags & _SCORED else ())
        kinds = tuple(_U8 if name == "seed" else _F4 if name in _FLOATS else _I4 for name in names)
        count = len(names) + 1
        padding = "" if count % 2 == 0 else "4x"
        return _Parts(kinds, tuple(kind is _F4 for kind in kinds), struct.Struct(f"<{count}I{padding}"))


_PARTS = tuple(_Parts.of(flags) for flags in range(8))


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as bytes. Raises WireError for one larger than a peer accepts."""
    flags = (_EDITS if plan.sampling.edits is not None else 0) | (_SCORED if plan.scored is not None else 0)
    flags |= _FOLLOWS if plan.follows else 0
    columns: list[Any] = [*_SAMPLING_OF(plan.sampling), *_PLAN_OF(plan)]
    if flags & _EDITS:
        columns += _EDITS_OF(plan.sampling.edits)
    if flags & _SCORED:
        columns += _SCORED_OF(plan.scored)
    parts = _PARTS[flags]
    for place, kind in enumerate(parts.kinds):
        column = columns[place]
        if column.dtype is not kind or not column.flags.c_contiguous:
            columns[place] = np.ascontiguousarray(column, kind)
    sizes = [column.nbytes >> 2 for column in columns]
    head = _HEAD.pack(plan.step, plan.num_decode, plan.num_continued, flags, len(sizes))
    data = b"".join((head, parts.sizes.pack(*sizes, plan.block_tables.shape[1]), *columns))
    if len(data) > MAX_PLAN_BYTES:
        raise WireError(f"step {plan.step}: a plan of {len(data)} bytes is over {MAX_PLAN_BYTES}")
    return data


def decode_plan(data: bytes | bytearray | memoryview) -> StepPlan:
    """The plan in `data`; its columns are views of it. Raises WireError."""
    if not _HEAD.size <= len(data) <= MAX_PLAN_BYTES or len(data) % 4:
        raise WireError(f"a plan of {len(data)} bytes")
    step, num_decode, num_continued, flags, count = _HEAD.unpack_from(data)
    if flags >= len(_PARTS) or count != len(_PARTS[flags].kinds):
        raise WireError(f"a plan of {count} columns with flags {flags}")
    parts = _PARTS[flags]
    at = (_HEAD.size + parts.sizes.size) // 4
    if len(data) < 4 * at:
        raise WireError(f"a plan of {len(data)} bytes ends in its sizes")
    *sizes, width = parts.sizes.unpack_from(data, _HEAD.size)
    words = np.frombuffer(data, _I4)
    if sum(sizes) != len(words) - at:
        raise WireError(f"a plan's columns add up to {4 * sum(sizes)} bytes, {len(data) - 4 * at} came")
    _check_sizes(step, sizes, width)
    views = (words, words.view(_F4))
    columns: list[Any] = []
    for floating, size in zip(parts.floats, sizes, strict=True):
        end = at + size
        columns.append(views[floating][at:end])
        at = end
    columns[0] = columns[0].view(_U8)
    columns[_TABLE] = columns[_TABLE].reshape(sizes[_ROWS], width)
    columns[_COPIES] = columns[_COPIES].reshape(-1, 2)
    plan = _put_together(step, (num_decode, num_continued), flags, columns)
    _check(plan)
    return plan


def _put_together(step: int, numbers: tuple[int, int], flags: int, columns: list[Any]) -> StepPlan:
    """From the columns in the order in which they travel; positions instead of names cost half."""
    optional = len(_SAMPLING) + len(_PLAN)
    edits = scored = None
    if flags & _EDITS:
        own = columns[optional : optional + len(_EDIT_COLUMNS)]
        own[_MASKS] = _rows_of(own[_MASKS], own[_MASKED_ROWS], sampled=len(columns[0]))
        edits = LogitEdits(*own)
        optional += len(_EDIT_COLUMNS)
    if flags & _SCORED:
        scored = ScoredPrompt(*columns[optional:])
    seed, temperature, top_k, top_p, min_p, choice, position, logprobs = columns[: len(_SAMPLING)]
    sampling = SamplingBatch(temperature, top_k, top_p, min_p, seed, choice, position, logprobs, edits)
    slots, starts, offsets, token_ids, tables, sample_rows, copies, embed_rows, adapters = columns[
        len(_SAMPLING) : len(_SAMPLING) + len(_PLAN)
    ]
    return StepPlan(
        step,
        slots,
        starts,
        offsets,
        token_ids,
        tables,
        sample_rows,
        sampling,
        numbers[0],
        copies,
        scored,
        embed_rows,
        numbers[1],
        bool(flags & _FOLLOWS),
        adapters,
    )


def _rows_of(words: I32, rows: I32, sampled: int) -> I32:
    """The masks [M, words] of these M sampled rows. Raises WireError where they do not match."""
    count = len(rows)
    if not count and not len(words):
        return words.reshape(0, 0)
    if not count or len(words) % count or not 0 <= rows.min() <= rows.max() < sampled:
        raise WireError(f"masks of {len(words)} words for {count} of {sampled} sampled rows")
    return words.reshape(count, -1)


def _check_sizes(step: int, sizes: list[int], width: int) -> None:
    """Raises WireError unless columns that have an entry each for the same things have the same number of them."""
    rows, sampled = sizes[_ROWS], sizes[_ROWS + _PLAN.index("sample_rows")]
    if sizes[: len(_SAMPLING)] != [2 * sampled] + [sampled] * (len(_SAMPLING) - 1):
        raise WireError(f"step {step}: not one set of sampling parameters per sampled row")
    if sizes[_ROWS + 1 : _ROWS + 3] != [rows, rows + 1] or sizes[_TABLE] != rows * width:
        raise WireError(f"step {step}: not one start, offset and table per row")
    if sizes[_ADAPTERS] not in (0, rows):
        raise WireError(f"step {step}: not one adapter per row")
    if sizes[_COPIES] % 2:
        raise WireError(f"step {step}: copies are no pairs")


def _check(plan: StepPlan) -> None:
    """Raises WireError unless rows are where the plan says."""
    rows, step, offsets = len(plan.slots), plan.step, plan.offsets
    falling = np.less(offsets[1:], offsets[:-1]).tobytes().count(1)  # quicker than any()
    if offsets[0] != 0 or offsets[-1] != len(plan.token_ids) or falling:
        raise WireError(f"step {step}: offsets do not cut the tokens into rows")
    if len(plan.sample_rows) and np.maximum.reduce(plan.sample_rows.view(np.uint32)) >= rows:  # negative ones are large
        raise WireError(f"step {step}: a sampled row is none of the {rows} rows")
    if max(plan.num_decode, plan.num_continued) > rows:
        raise WireError(f"step {step}: {plan.num_decode} of {rows} rows decode and {plan.num_continued} go on")
