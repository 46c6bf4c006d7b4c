"""The decoder alone: logits against transformers, chunks against the whole, and what it leaves in the KV blocks."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, Reference, family_specs, make_checkpoint
from fakes.in_process import load_runner

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch
from penstock.workers.model.decoder import Decoder
from penstock.workers.model.rope import rope_tables

WINDOWED_QWEN3 = CheckpointSpec(
    "qwen3", 4, 1, 64, changes='{"use_sliding_window": true, "sliding_window": 20, "max_window_layers": 1}'
)
SPECS = [CheckpointSpec("llama", llama3_rope=True), CheckpointSpec("qwen3", 4, 1, 64), WINDOWED_QWEN3, *family_specs()]


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS[1:2] + family_specs()[::3], ids=lambda spec: spec.name)
def test_narrow_dtypes_are_as_close_to_float64_as_transformers(load_model, tmp_path, spec, dtype):
    """Of a checkpoint in that dtype, so that rounded weights are nobody's error."""
    directory = make_checkpoint(tmp_path, spec, dtype=getattr(torch, dtype))
    decoder = load_runner(directory, dtype=dtype, max_model_len=512)._decoder
    tokens = np.random.default_rng(5).integers(0, spec.vocab, 100).tolist()
    ours = forward(decoder, storage(spec).to(getattr(torch, dtype)), tokens, 0, list(range(100)))[:-1]
    (theirs,) = Reference(directory, getattr(torch, dtype)).logits([tokens[:1]], [tokens[1:]])
    (truth,) = Reference(directory).logits([tokens[:1]], [tokens[1:]])
    error, allowed = ((ours - truth).abs().mean(), (theirs - truth).abs().mean())
    assert 0 < error <= 1.2 * allowed


MISTRAL, QWEN2, GEMMA2, GEMMA3 = family_specs()[::3]


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (MISTRAL, {"windows": (25, 24)}),
        (MISTRAL, {"windows": (0, 0)}),
        (QWEN2, {"windows": (0, 23)}),
        (QWEN2, {"windows": (24, 24)}),
        (GEMMA2, {"windows": (0, 24)}),
        (GEMMA2, {"attention_cap": 0.0}),
        (GEMMA2, {"logit_cap": 0.0}),
        (GEMMA2, {"embedding_scale": 1.0}),
        (GEMMA2, {"attention_scale": 64**-0.5}),
        (GEMMA2, {"activation": "silu"}),
        (GEMMA3, {"windows": (24,) * 6}),
        (GEMMA3, {"local_rope": None}),
    ],
    ids=lambda value: value.name if isinstance(value, CheckpointSpec) else "-".join(value),
)
def test_every_part_of_a_family_matters(load_model, spec, change):
    """A decoder that lacks one part, or has it wrong by one, is told from the right one by its logits."""
    model = load_model(spec)
    right = model.runner._decoder
    config = dataclasses.replace(right.config, **change)
    tables = [rope and rope_tables(rope, config.head_dim, 512) for rope in (config.rope, config.local_rope)]
    tokens = np.random.default_rng(3).integers(0, spec.vocab, 100).tolist()
    (theirs,) = model.reference.logits([tokens[:1]], [tokens[1:]])
    wrong = forward(Decoder(config, right._weights, *tables), storage(spec), tokens, 0, list(range(100)))
    assert (wrong[:-1] - theirs).abs().max() > 0.05
