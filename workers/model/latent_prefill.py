"""Latent attention over keys and values made anew from stored rows: the cheaper form for long chunks of prompts.

`latent_attention.py` brings queries to the latent ("absorbed"), which reads stored rows as they are: best for few
queries. A pair of query and key then costs 2 (R + D) + 2 R operations a head, and each new token 2 R (N + V) for its
way there and back. Keys and values made of stored rows cost 2 R (N + V) a row, and a pair 4 K, K the larger of N + D
and V (the shorter one is padded). What is made is also written and read again, so it counts one and a half times: there
the two forms meet on a CPU. With s stored and n new tokens, p = n s + n (n + 1) / 2 pairs, the second is cheaper where

    p (4 R + 2 D - 4 K) > (1.5 (s + n) - n) 2 R (N + V)

(DeepSeek-V2, 2024, section 2.1, for both forms). For DeepSeek's sizes that is from about 190 new tokens on for a whole
prompt, and from about 280 on behind any number of stored ones.
A `LatentPrefill` is made once per step by the decoder and used layer by layer. Keys and values live in scratch for a
few heads at a time, as blocks that `ops.paged_attention` reads, so no matrix of scores is ever written out. It knows no
sequences and no owners of blocks.
Legend: T packed tokens, H query heads, h heads at a time, R latent, N plain and D rotated numbers of a head, V value
size, K width of scratch; B blocks, P slots of a block, S slots of all scratch blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.attention_checks import MOST_DIM
from penstock.kernels.ragged import AttentionPlan, RaggedBatch
from penstock.workers.model.latent_fields import LatentShape

_SCRATCH_BYTES = 64 << 20


def rows_to_expand(batch: RaggedBatch, shape: LatentShape) -> NDArray[np.bool_]:
    """[rows] of the batch: those that cost less with keys and values made anew."""
    stored, new = batch.starts.astype(np.int64), batch.counts.astype(np.int64)
    pairs = new * stored + new * (new + 1) // 2
    saved = 2 * shape.kv_rank + shape.rope_dim - 2 * _width(shape)
    made = (1.5 * stored + 0.5 * new) * shape.kv_rank * (shape.plain_dim + shape.value_dim)
    chosen: NDArray[np.bool_] = pairs * saved > made
    return chosen & (_width(shape) <= MOST_DIM)


class LatentPrefill:
    """The chosen rows of one step, whose tokens are `tokens`.

    `others` is the plan of those that stay in the latent, None where there are none, `other_tokens` their tokens.
    """

    def __init__(
        self, kv_BLCHPD: Tensor, batch: RaggedBatch, chosen: NDArray[np.bool_], shape: LatentShape, heads: int
    ) -> None:
        slots, device = kv_BLCHPD.shape[4], kv_BLCHPD.device
        lengths = (batch.starts + batch.counts)[chosen].astype(np.int64)
        used = -(-lengths // slots)
        self._shape = shape
        self.tokens, own = _part(batch, chosen, device)
        self.other_tokens, rest = _part(batch, ~chosen, device)
        self.others = ops.plan_attention(kv_BLCHPD, rest) if len(rest.starts) else None
        self._places = _places(own.block_tables, lengths, used, slots, device)
        blocks = int(used.sum())
        self._heads = _heads_at_once(heads, 2 * blocks * slots * _width(shape) * kv_BLCHPD.element_size())
        self._scratch = kv_BLCHPD.new_zeros(blocks, 1, 2, self._heads, slots, _width(shape))
        borders = np.concatenate(([0], np.cumsum(used))).astype(np.int32)
        tables = np.minimum(borders[:-1, None] + np.arange(int(used.max()), dtype=np.int32), blocks - 1)
        self._plan: AttentionPlan = ops.plan_attention(self._scratch, RaggedBatch(own.starts, own.offsets, tables))

    def attend(
        self, query_tHq: Tensor, kv_BLCHPD: Tensor, layer: int, key_up: Tensor, value_up: Tensor, scale: float
    ) -> Tensor:
        """Values [t, H, V] of the tokens `tokens`, whose queries [t, H, N + D] are rotated.

        `key_up` [H, N, R] and `value_up` [H, R, V] are the layer's up-projections.
        """
        shape, scratch = self._shape, self._scratch
        blocks, slots = self._places
        rows_SD = kv_BLCHPD[blocks, layer, 0, 0, slots]
        latent_SR, turned_SD = rows_SD[:, : shape.kv_rank], rows_SD[:, shape.kv_rank :]
        count, size, plain = len(scratch), kv_BLCHPD.shape[4], shape.plain_dim
        scratch[:, 0, 0, :, :, plain : shape.query_dim] = turned_SD.view(count, 1, size, -1)
        values = query_tHq.new_empty(len(query_tHq), len(key_up), shape.value_dim)
        for first in range(0, len(key_up), self._heads):
            some = slice(first, first + self._heads)
            keys_hSN = torch.matmul(latent_SR, key_up[some].transpose(1, 2))
            values_hSV = torch.matmul(latent_SR, value_up[some])
            scratch[:, 0, 0, :, :, :plain] = keys_hSN.view(self._heads, count, size, -1).transpose(0, 1)
            scratch[:, 0, 1, :, :, : shape.value_dim] = values_hSV.view(self._heads, count, size, -1).transpose(0, 1)
            asked = torch.nn.functional.pad(query_tHq[:, some], (0, _width(shape) - shape.query_dim)).contiguous()
            attended = ops.paged_attention(asked, scratch, 0, self._plan, scale)
            values[:, some] = attended[..., : shape.value_dim]
        return values


def _width(shape: LatentShape) -> int:
    return max(shape.query_dim, shape.value_dim)


def _heads_at_once(heads: int, bytes_of_head: int) -> int:
    """The most heads whose keys and values fit the scratch; they divide `heads`."""
    most = max(1, _SCRATCH_BYTES // bytes_of_head)
    return next(size for size in range(min(heads, most), 0, -1) if heads % size == 0)


def _part(batch: RaggedBatch, chosen: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, RaggedBatch]:
    """(the packed tokens of these rows, a batch of them alone)."""
    counts = batch.counts
    tokens = np.flatnonzero(np.repeat(chosen, counts))
    offsets = np.concatenate(([0], np.cumsum(counts[chosen]))).astype(np.int32)
    part = RaggedBatch(batch.starts[chosen], offsets, batch.block_tables[chosen])
    return torch.from_numpy(tokens).to(device), part


def _places(
    tables: NDArray[np.int32], lengths: NDArray[np.int64], used: NDArray[np.int64], slots: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(block, slot) of the stored row for every slot of scratch; behind a row's end its own first one."""
    rows = np.repeat(np.arange(len(used)), used * slots)
    positions = np.concatenate([np.arange(count * slots) for count in used.tolist()])
    positions = np.where(positions < lengths[rows], positions, 0)
    blocks = tables[rows, positions // slots].astype(np.int64)
    return torch.from_numpy(blocks).to(device), torch.from_numpy(positions % slots).to(device)
