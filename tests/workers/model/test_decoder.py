"""The decoder alone: logits against transformers, chunks against the whole, and what it leaves in the KV blocks."""

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch

SPECS = [CheckpointSpec("llama", llama3_rope=True), CheckpointSpec("qwen3", 4, 1, 64)]


def forward(decoder, kv, tokens, start, sampled):
    count = len(tokens)
    table = np.arange(8, dtype=np.int32)[None]
    batch = RaggedBatch(np.array([start], np.int32), np.array([0, count], np.int32), table)
    plan = ops.plan_attention(kv, batch)
    with torch.inference_mode():
        hidden = decoder.forward(
            torch.tensor(tokens), torch.arange(start, start + count), kv, plan, torch.tensor(sampled)
        )
        return decoder.logits(hidden)


def storage(spec):
    return torch.zeros(8, spec.layers, 2, spec.kv_heads, 16, spec.head_dim)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_logits_of_every_position(load_model, spec):
    model = load_model(spec)
    tokens = np.random.default_rng(3).integers(0, spec.vocab, 100).tolist()
    ours = forward(model.runner._decoder, storage(spec), tokens, 0, list(range(100)))
    (theirs,) = model.reference.logits([tokens[:1]], [tokens[1:]])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[:-1].double(), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_chunks_leave_the_same_blocks_as_the_whole(load_model, spec):
    decoder = load_model(spec).runner._decoder
    tokens = np.random.default_rng(4).integers(0, spec.vocab, 75).tolist()
    whole, chunked = storage(spec), storage(spec)
    expected = forward(decoder, whole, tokens, 0, [74])
    for begin in (0, 1, 17, 40, 74):
        end = {0: 1, 1: 17, 17: 40, 40: 74, 74: 75}[begin]
        logits = forward(decoder, chunked, tokens[begin:end], begin, [end - begin - 1] if end == 75 else [])
        assert logits.shape == ((1, spec.vocab) if end == 75 else (0, spec.vocab))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    assert (whole[5:] == 0).all()
