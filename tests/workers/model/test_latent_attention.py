"""The decoder over latent rows: logits against transformers, chunks against the whole, narrow dtypes, every part."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, Reference, make_checkpoint
from fakes.in_process import load_runner
from fakes.latent_specs import latent_specs

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch
from penstock.workers.model.decoder import Decoder
from penstock.workers.model.implementation import choose_implementation
from penstock.workers.model.loading import decoder_ropes

SPECS = latent_specs()
V2_PLAIN, V2_GROUPS, V3_GROUPS, V3_PLAIN, V3_MANY = SPECS


def storage(decoder, dtype=torch.float32):
    config = decoder.config
    return torch.zeros(8, config.num_layers, 1, 1, 16, config.latent.stored_dim, dtype=dtype)


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


def tokens_of(spec, seed=3):
    return np.random.default_rng(seed).integers(0, spec.vocab, 100).tolist()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_logits_of_every_position(load_model, spec):
    model, tokens = load_model(spec), tokens_of(spec)
    decoder = model.runner._decoder
    ours = forward(decoder, storage(decoder), tokens, 0, list(range(100)))
    (theirs,) = model.reference.logits([tokens[:1]], [tokens[1:]])
    torch.testing.assert_close(ours[:-1].double(), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_chunks_leave_the_same_rows_as_the_whole(load_model, spec):
    decoder, tokens = load_model(spec).runner._decoder, tokens_of(spec)[:75]
    whole, chunked = storage(decoder), storage(decoder)
    expected = forward(decoder, whole, tokens, 0, [74])
    for begin, end in ((0, 1), (1, 17), (17, 40), (40, 74), (74, 75)):
        logits = forward(decoder, chunked, tokens[begin:end], begin, [end - begin - 1] if end == 75 else [])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    assert (whole[5:] == 0).all()
    assert (whole[:4] != 0).any(dim=-1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", [V2_GROUPS, V3_GROUPS], ids=lambda spec: spec.name)
def test_narrow_dtypes_are_as_close_to_float64_as_transformers(load_model, tmp_path, spec, dtype):
    """Of a checkpoint in that dtype; the median token, since rounding sends some to other experts, ours and theirs."""
    directory = make_checkpoint(tmp_path, spec, dtype=getattr(torch, dtype))
    decoder = load_runner(directory, dtype=dtype, max_model_len=512)._decoder
    tokens = tokens_of(spec, seed=5)
    ours = forward(decoder, storage(decoder, getattr(torch, dtype)), tokens, 0, list(range(100)))[:-1]
    (theirs,) = Reference(directory, getattr(torch, dtype)).logits([tokens[:1]], [tokens[1:]])
    (truth,) = Reference(directory).logits([tokens[:1]], [tokens[1:]])
    error, allowed = ((each - truth).abs().mean(dim=-1).median() for each in (ours, theirs))
    assert 0 < error <= 1.2 * allowed


def changed(decoder, **changes):
    """The same weights under another configuration; keys of the experts and the latent's shape go where they belong."""
    config = decoder.config
    experts = {key: changes.pop(key) for key in list(changes) if hasattr(config.experts, key)}
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, **experts), **changes)
    return Decoder(config, decoder._weights, *decoder_ropes(config, 512))


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (V2_PLAIN, {"top_k": 1}),
        (V2_PLAIN, {"renormalize": True}),
        (V2_GROUPS, {"groups": 0, "top_groups": 0}),
        (V2_GROUPS, {"top_groups": 3}),
        (V2_GROUPS, {"scaling": 1.0}),
        (V2_GROUPS, {"attention_scale": 60**-0.5}),
        (V3_GROUPS, {"groups": 0, "top_groups": 0}),
        (V3_GROUPS, {"scoring": "softmax"}),
        (V3_GROUPS, {"renormalize": False}),
        (V3_GROUPS, {"scaling": 1.0}),
        (V3_PLAIN, {"renormalize": True}),
    ],
    ids=lambda value: value.name if isinstance(value, CheckpointSpec) else "-".join(value),
)
def test_every_part_of_the_configuration_matters(load_model, spec, change):
    model = load_model(spec)
    assert distance(model, changed(model.runner._decoder, **change)) > 0.05


def with_layers(decoder, change):
    layers = tuple(change(layer) for layer in decoder._weights.layers)
    weights = dataclasses.replace(decoder._weights, layers=layers)
    return Decoder(decoder.config, weights, *decoder_ropes(decoder.config, 512))


def without_shared(layer):
    kept = not hasattr(layer.mlp, "shared")
    return layer if kept else dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, shared=None))


def without_choice(layer):
    kept = not hasattr(layer.mlp, "selection_bias")
    return layer if kept else dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, selection_bias=None))


def other_pairs(layer):
    shape = dataclasses.replace(layer.qkv.shape, interleaved=not layer.qkv.shape.interleaved)
    return dataclasses.replace(layer, qkv=dataclasses.replace(layer.qkv, shape=shape))


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (V2_PLAIN, without_shared),
        (V3_GROUPS, without_shared),
        (V3_GROUPS, without_choice),
        (V2_PLAIN, other_pairs),
        (V3_PLAIN, other_pairs),
    ],
)
def test_every_part_of_the_weights_matters(load_model, spec, change):
    model = load_model(spec)
    assert distance(model, with_layers(model.runner._decoder, change)) > 0.05


def distance(model, decoder):
    """The largest difference of a logit from transformers'."""
    tokens = tokens_of(model.spec)
    (theirs,) = model.reference.logits([tokens[:1]], [tokens[1:]])
    return (forward(decoder, storage(decoder), tokens, 0, list(range(100)))[:-1] - theirs).abs().max()


def test_a_token_takes_one_row_of_every_layer(load_model):
    layout = load_model(V3_GROUPS).runner.layout
    assert (layout.parts, layout.num_kv_heads, layout.head_dim) == (1, 1, 96 + 32)
    assert layout.token_bytes == 2 * 128 * 4


def test_what_we_do_not_compute_is_left_to_transformers(tmp_path):
    raw = json.loads((make_checkpoint(tmp_path, V2_PLAIN) / "config.json").read_text())
    assert choose_implementation("auto", raw, "config.json").reason == "DeepseekV2ForCausalLM is one of our own"
    foreign = choose_implementation("auto", {**raw, "norm_topk_prob": True}, "config.json")
    assert (
        foreign.reason == "our own decoder: config.json: norm_topk_prob: only false is supported with this architecture"
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_both_forms_of_attention_give_the_same(load_model, spec, monkeypatch):
    """Rows that make keys and values anew beside those that do not, in one step; then none that does."""
    decoder, tokens = load_model(spec).runner._decoder, tokens_of(spec)
    chosen = []

    def both(batch, shape):
        chosen.append(batch.counts % 2 == 0)
        return chosen[-1]

    def run():
        kv, begins, counts = storage(decoder), [0, 30, 31], [30, 1, 44]
        for begin, count in zip(begins, counts, strict=True):
            logits = forward(decoder, kv, tokens[begin : begin + count], begin, list(range(count)))
        return logits

    monkeypatch.setattr("penstock.workers.model.decoder.rows_to_expand", both)
    anew = run()
    assert [row.tolist() for row in chosen] == [[True], [True]]  # a decode's step is never asked for
    monkeypatch.setattr("penstock.workers.model.decoder.rows_to_expand", lambda batch, _: batch.counts < 0)
    torch.testing.assert_close(anew, run(), atol=2e-4, rtol=1e-4)
