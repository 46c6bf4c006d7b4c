"""Keys and values made of latent rows: the same attention as in the latent, chosen where it costs less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.kernels import ops, reference
from penstock.kernels.ragged import AttentionPlan, RaggedBatch
from penstock.workers.model import latent_prefill
from penstock.workers.model.latent_fields import LatentShape
from penstock.workers.model.latent_prefill import LatentPrefill, rows_to_expand

DEEPSEEK = LatentShape(None, 512, 128, 64, 128, True)
NARROW, WIDE_VALUES = LatentShape(None, 50, 28, 16, 20, True), LatentShape(None, 96, 24, 8, 48, True)
HEADS, SLOTS, LAYERS = 6, 4, 2


def batch_of(*rows: tuple[int, int], seed: int = 0) -> RaggedBatch:
    """Rows of (stored, new) tokens with shuffled blocks."""
    used = [-(-(stored + new) // SLOTS) for stored, new in rows]
    blocks = np.random.default_rng(seed).permutation(sum(used)).astype(np.int32)
    tables = np.zeros((len(rows), max(used)), np.int32)
    for row, count in enumerate(used):
        tables[row, :count], blocks = blocks[:count], blocks[count:]
    offsets = np.concatenate(([0], np.cumsum([new for _, new in rows]))).astype(np.int32)
    return RaggedBatch(np.array([stored for stored, _ in rows], np.int32), offsets, tables)


def truth(query, kv, layer, batch, key_up, value_up, shape, scale):
    """The absorbed form in float64."""
    query, kv, key_up, value_up = (each.double() for each in (query, kv, key_up, value_up))
    brought = torch.einsum("thn,hnr->thr", query[..., : shape.plain_dim], key_up)
    brought = torch.cat((brought, query[..., shape.plain_dim :]), dim=-1)
    plan = AttentionPlan(batch)
    attended = reference.latent_attention.latent_attention(brought, kv, layer, plan, scale, shape.kv_rank)
    return torch.einsum("thr,hrv->thv", attended, value_up)


@pytest.mark.parametrize("shape", [NARROW, WIDE_VALUES], ids=["narrow", "wide-values"])
@pytest.mark.parametrize("scratch_bytes", [1, 60_000, 1 << 30])  # one head at a time, some, all
def test_values_are_those_of_the_latent(
    shape: LatentShape, scratch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_prefill, "_SCRATCH_BYTES", scratch_bytes)
    torch.manual_seed(0)
    batch = batch_of((5, 1), (0, 17), (7, 30), (12, 4), (30, 3), (3, 9))
    chosen = np.array([False, True, True, True, False, True])
    kv = torch.full((int(batch.block_tables.max()) + 1, LAYERS, 1, 1, SLOTS, shape.stored_dim), torch.nan)
    stored = batch.starts + batch.counts
    for row, table in enumerate(batch.block_tables):
        positions = np.arange(stored[row])
        kv[table[positions // SLOTS], :, 0, 0, positions % SLOTS] = torch.randn(
            len(positions), LAYERS, shape.stored_dim
        )
    key_up, value_up = (
        torch.randn(HEADS, shape.plain_dim, shape.kv_rank),
        torch.randn(HEADS, shape.kv_rank, shape.value_dim),
    )
    query, scale = torch.randn(batch.num_tokens, HEADS, shape.query_dim), 0.05
    prefill = LatentPrefill(torch.nan_to_num(kv), batch, chosen, shape, HEADS)
    expected = truth(query, torch.nan_to_num(kv), 1, batch, key_up, value_up, shape, scale)[prefill.tokens]
    # Slots behind a row's end are never read, whatever they hold.
    found = prefill.attend(query[prefill.tokens], kv, 1, key_up, value_up, scale)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)
    assert prefill.tokens.tolist() == [*range(1, 52), *range(55, 64)]
    assert prefill.other_tokens.tolist() == [0, 52, 53, 54]
    assert prefill.others is not None
    assert prefill.others.batch.starts.tolist() == [5, 30]


def cost(shape: LatentShape, stored: int, new: int) -> tuple[float, float]:
    """Operations of one head, as the module counts them: in the latent, and with keys and values made anew."""
    pairs = sum(stored + place + 1 for place in range(new))
    way = 2 * shape.kv_rank * (shape.plain_dim + shape.value_dim)
    wide = max(shape.query_dim, shape.value_dim)
    return pairs * (2 * shape.stored_dim + 2 * shape.kv_rank) + new * way, pairs * 4 * wide + 1.5 * (stored + new) * way


@pytest.mark.parametrize("shape", [DEEPSEEK, NARROW, WIDE_VALUES], ids=["deepseek", "narrow", "wide-values"])
def test_the_cheaper_form_is_chosen(shape: LatentShape) -> None:
    rows = [(stored, new) for stored in (0, 1, 100, 1000, 30000) for new in (1, 2, 60, 100, 186, 187, 290, 1024)]
    chosen = rows_to_expand(batch_of(*rows), shape)
    expected = [expanded < absorbed for absorbed, expanded in (cost(shape, *row) for row in rows)]
    assert chosen.tolist() == expected
    assert not chosen[np.array(rows)[:, 1] == 1].any()  # a decode stays in the latent
    if shape is DEEPSEEK:
        assert dict(zip(rows, chosen.tolist(), strict=True))[30000, 290]


def test_heads_wider_than_paged_attention_takes_stay_in_the_latent() -> None:
    widest = LatentShape(None, 900, 192, 64, 128, True)
    wider = LatentShape(None, 900, 193, 64, 128, True)
    assert rows_to_expand(batch_of((0, 2048)), widest).all()
    assert not rows_to_expand(batch_of((0, 2048)), wider).any()


def test_plans_are_of_the_storage_they_are_for() -> None:
    """The others' plan is one that `ops.latent_attention` takes."""
    batch, chosen = batch_of((5, 1), (0, 17)), np.array([False, True])
    kv = torch.randn(8, LAYERS, 1, 1, SLOTS, NARROW.stored_dim)
    prefill = LatentPrefill(kv, batch, chosen, NARROW, HEADS)
    query = torch.randn(1, HEADS, NARROW.stored_dim)
    assert prefill.others is not None
    found = ops.latent_attention(query, kv, 0, prefill.others, 0.1, NARROW.kv_rank)
    plan = AttentionPlan(batch_of((5, 1)))
    alone = RaggedBatch(plan.batch.starts, plan.batch.offsets, batch.block_tables[:1])
    expected = reference.latent_attention.latent_attention(query, kv, 0, AttentionPlan(alone), 0.1, NARROW.kv_rank)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
