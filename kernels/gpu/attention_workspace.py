"""An attention plan in device memory: one buffer of whole numbers, sent in one transfer, and room for partial states.

Called by `attention.py`. With a workspace every step's plan lands at the same addresses and, where its limits say
`padded`, every launch has the size of the maxima: what a captured graph needs so that a replay only takes a new plan
(Ye et al. 2025, "FlashInfer", section 3.3). Plans into one workspace must be made on the stream that runs them, in
order: the transfer of the next overwrites the buffer of the last. Knows lengths, maxima and memory; no kernel.
Legend: N rows, T tokens, Hq query heads, H kv heads, D head dim, P slots of a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu.attention_buffer import PinnedRing, PlanLayout, layout_for, pack
from penstock.kernels.gpu.attention_plan import (
    Geometry,
    PlanArrays,
    PlanCaps,
    PlanSettings,
    caps_for,
    fixed_caps,
    make_plan,
    query_tile_for,
    write_slots,
)
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch
from penstock.kernels.shared_prefix import SharingRule

# Sharing costs a launch and a merge, some microseconds, in which a card reads this much.
LEAST_SAVED_BYTES = 16 << 20
_PINNED = 3  # steps whose plans may be under way at once


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPlan:
    """What the kernels are launched with. Grid sizes are those of the step, or the maxima where padded."""

    counts: Tensor  # int32; all sections are views of one buffer
    decode_items: Tensor
    tile_items: Tensor
    tokens: Tensor
    positions: Tensor
    write_slots: Tensor
    merge_tokens: Tensor
    merge_indptr: Tensor
    merge_slots: Tensor
    tables: Tensor
    num_decode: int
    num_tile: int
    num_merge: int
    num_tokens: int
    query_tile: int
    partial_o: Tensor  # [partial tokens, Hq, D] float32
    partial_lse: Tensor  # [partial tokens, Hq] float32
    kv_tokens_read: int
    padded: bool


@dataclass(frozen=True, slots=True, eq=False)
class GpuWorkspace(AttentionWorkspace):
    """Buffers for every plan within the limits."""

    geometry: Geometry
    settings: PlanSettings
    caps: PlanCaps
    layout: PlanLayout
    ring: PinnedRing
    buffer: Tensor  # int32
    partial_o: Tensor
    partial_lse: Tensor


def geometry_of(kv_BLCHPD: Tensor, query_heads: int) -> Geometry:
    """Of a storage read by `query_heads` heads."""
    _, _, parts, heads, slots, dim = kv_BLCHPD.shape
    return Geometry(query_heads, heads, slots, parts * heads * dim * kv_BLCHPD.element_size())


@functools.lru_cache(maxsize=16)
def settings_for(device: torch.device, dim: int) -> PlanSettings:
    """The device's number of multiprocessors, what sharing must save there, and the largest tile of this head size."""
    most_tile = 128 if dim <= 128 or has_warpgroups(device) else 64
    if device.type == "cpu":
        return PlanSettings()
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return PlanSettings(sm_count=count, most_tile=most_tile, sharing=SharingRule(min_saved_bytes=LEAST_SAVED_BYTES))


@functools.lru_cache(maxsize=16)
def has_warpgroups(device: torch.device) -> bool:
    """Whether four warps multiply together from shared memory (sm_90), which leaves registers for larger tiles."""
    if device.type == "cpu":  # the interpreter takes the configurations of sm_90
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def make_workspace(kv_BLCHPD: Tensor, limits: AttentionLimits, settings: PlanSettings | None = None) -> GpuWorkspace:
    """See `ops.attention_workspace`."""
    geometry, settings = geometry_of(kv_BLCHPD, limits.query_heads), settings or _settings_of(kv_BLCHPD)
    few = settings.sharing is None or limits.max_rows < settings.sharing.min_sharers
    if limits.fixed_split or not limits.shared_prefix or few:  # without sharing a decode step has no tiles to launch
        settings = replace(settings, fixed_split=limits.fixed_split, sharing=None)
    least = query_tile_for(0, 1, geometry.group)
    if limits.fixed_split:  # the tile, too, is the same whatever the batch
        settings = replace(settings, query_tile=max(64, least))
    elif limits.padded:  # it is part of the compiled kernel, and so of a captured launch
        settings = replace(
            settings, query_tile=query_tile_for(limits.max_tokens, 1, geometry.group, settings.most_tile)
        )
    caps = _caps(geometry, settings, limits, least)
    entries = limits.max_rows * -(-limits.max_length // geometry.slots)
    layout = layout_for(caps, limits.max_tokens, entries)
    device, partials = kv_BLCHPD.device, max(1, caps.decode_partials + caps.tile_partials)
    shape = (partials, limits.query_heads, kv_BLCHPD.shape[-1])
    return GpuWorkspace(
        limits,
        geometry,
        settings,
        caps,
        layout,
        PinnedRing(layout.size, device, _PINNED),
        torch.zeros(layout.size, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape[:2], dtype=torch.float32, device=device),
    )


def _caps(geometry: Geometry, settings: PlanSettings, limits: AttentionLimits, least: int) -> PlanCaps:
    rows, tokens = limits.max_rows, limits.max_tokens
    if limits.fixed_split:
        length, split = limits.max_length, limits.fixed_split
        return fixed_caps(rows, tokens, length, settings.query_tile, geometry.group, split)
    if settings.query_tile:
        return caps_for(rows, tokens, settings.query_tile, geometry, settings)
    # The tile is chosen by the step: small ones are many, large ones hold more partial states.
    many, large = (caps_for(rows, tokens, tile, geometry, settings) for tile in (least, max(128, least)))
    return replace(many, tile_partials=large.tile_partials)


def prepare_in(workspace: GpuWorkspace, batch: RaggedBatch) -> PreparedPlan:
    """Plan a step into the workspace. Raises KernelInputError when the batch is over its limits."""
    limits, caps = workspace.limits, workspace.caps
    over = (
        len(batch.starts) > limits.max_rows
        or batch.num_tokens > limits.max_tokens
        or int((batch.starts + batch.counts).max(initial=0)) > limits.max_length
    )
    if over:
        raise KernelInputError("plan_attention", "batch", f"larger than the workspace's limits {limits}")
    arrays = make_plan(batch, workspace.geometry, workspace.settings, caps)
    num_tokens = limits.max_tokens if limits.padded else batch.num_tokens
    used = pack(arrays, workspace.layout, num_tokens, workspace.ring.take())
    workspace.ring.send(used, workspace.buffer)
    prepared = _sections(workspace.buffer, workspace.layout, arrays, workspace.partial_o, workspace.partial_lse)
    if not limits.padded:
        return prepared
    return replace(
        prepared,
        num_decode=caps.decode_items,
        num_tile=caps.tile_items,
        num_merge=limits.max_tokens,
        num_tokens=limits.max_tokens,
        padded=True,
    )


def _settings_of(kv_BLCHPD: Tensor) -> PlanSettings:
    return settings_for(kv_BLCHPD.device, kv_BLCHPD.shape[-1])


def prepare(kv_BLCHPD: Tensor, query_heads: int, batch: RaggedBatch, settings: PlanSettings) -> PreparedPlan:
    """Plan a step into memory of its own."""
    device = kv_BLCHPD.device
    arrays = make_plan(batch, geometry_of(kv_BLCHPD, query_heads), settings)
    exact = PlanCaps(len(arrays.decode_items), len(arrays.tile_items), len(arrays.merge_slots), 0, len(arrays.tokens))
    layout = layout_for(exact, batch.num_tokens, arrays.tables.size)
    ring = PinnedRing(layout.size, device, 1)
    buffer = torch.empty(layout.size, dtype=torch.int32, device=device)
    ring.send(pack(arrays, layout, batch.num_tokens, ring.take()), buffer)
    shape = (max(1, arrays.partial_tokens), query_heads, kv_BLCHPD.shape[-1])
    partial_o = torch.empty(shape, dtype=torch.float32, device=device)
    partial_lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
    return _sections(buffer, layout, arrays, partial_o, partial_lse)


def _sections(
    buffer: Tensor, layout: PlanLayout, arrays: PlanArrays, partial_o: Tensor, partial_lse: Tensor
) -> PreparedPlan:
    return PreparedPlan(
        counts=buffer,
        decode_items=buffer[layout.decode_items :],
        tile_items=buffer[layout.tile_items :],
        tokens=buffer[layout.tokens :],
        positions=buffer[layout.positions :],
        write_slots=buffer[layout.write_slots :],
        merge_tokens=buffer[layout.merge_tokens :],
        merge_indptr=buffer[layout.merge_indptr :],
        merge_slots=buffer[layout.merge_slots :],
        tables=buffer[layout.tables :],
        num_decode=len(arrays.decode_items),
        num_tile=len(arrays.tile_items),
        num_merge=len(arrays.merge_tokens),
        num_tokens=len(arrays.positions),
        query_tile=arrays.query_tile,
        partial_o=partial_o,
        partial_lse=partial_lse,
        kv_tokens_read=arrays.kv_tokens_read,
        padded=False,
    )


def send_write_slots(batch: RaggedBatch, kv_BLCHPD: Tensor) -> Tensor:
    """[T] int32 in a transfer of its own."""
    slots = write_slots(batch.starts, batch.counts, batch.block_tables, kv_BLCHPD.shape[4])
    ring, target = PinnedRing(max(1, len(slots)), kv_BLCHPD.device, 1), torch.empty(len(slots), dtype=torch.int32)
    target = target.to(kv_BLCHPD.device)
    ring.take()[: len(slots)] = slots
    ring.send(len(slots), target)
    return target


@dataclass(frozen=True, slots=True, eq=False)
class GpuPlan(AttentionPlan):
    """Prepared where a workspace told the query heads; otherwise when the first layer asks, once for each number."""

    settings: PlanSettings
    prepared: dict[int, PreparedPlan]  # by query heads
    slots: list[Tensor]  # what a layer that writes before any has asked for attention was given

    @property
    def num_tokens(self) -> int:
        """See `AttentionPlan`; plans in a workspace with padding hold its most tokens."""
        return max((prepared.num_tokens for prepared in self.prepared.values()), default=self.batch.num_tokens)

    def write_slots(self, kv_BLCHPD: Tensor) -> Tensor:
        """[T] block * P + slot that each new token goes to, -1 for padding; int32 on the device."""
        for prepared in self.prepared.values():
            return prepared.write_slots
        if not self.slots:
            self.slots.append(send_write_slots(self.batch, kv_BLCHPD))
        return self.slots[0]

    def for_heads(self, kv_BLCHPD: Tensor, query_heads: int) -> PreparedPlan:
        """The prepared plan of a model with so many query heads."""
        if query_heads not in self.prepared:
            self.prepared[query_heads] = prepare(kv_BLCHPD, query_heads, self.batch, self.settings)
        return self.prepared[query_heads]
