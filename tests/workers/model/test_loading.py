"""Loading: the same model from one file and from shards, progress, dtypes, and errors that name the tensor."""

import json
import re

import pytest
import torch
from fakes.exactness import CheckpointSpec, expert_specs, make_checkpoint
from safetensors.torch import load_file, save_file

from penstock.kernels import ops
from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import read_config
from penstock.workers.model.decoder import ExpertMlp
from penstock.workers.model.loading import load_decoder

SPECS = [CheckpointSpec(), CheckpointSpec("qwen3", tied=True), CheckpointSpec(attention_bias=True)]
EXPERTS = expert_specs()
QWEN3_MOE, MIXTRAL, QWEN2_MOE = EXPERTS[::2]


def load(directory, dtype="float32", progress=None):
    return load_decoder(read_config(directory), Checkpoint(directory), dtype, 64, progress)


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("spec", SPECS + EXPERTS, ids=lambda spec: spec.name)
def test_progress_reaches_the_total(tmp_path, spec):
    steps = []
    load(make_checkpoint(tmp_path, spec), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(number + 1, steps[-1][1]) for number in range(len(steps))]
    assert steps[-1][0] == steps[-1][1] == len(load_file(tmp_path / "model.safetensors"))


def test_shards_and_single_file_are_one_model(tmp_path):
    single = make_checkpoint(tmp_path / "single", SPECS[0])
    many = make_checkpoint(tmp_path / "many", SPECS[0], shards=4)
    assert len(list(many.glob("*.safetensors"))) > 1
    ours, theirs = load(single)._weights, load(many)._weights
    assert torch.equal(ours.embedding, theirs.embedding)
    assert torch.equal(ours.layers[1].mlp_norm, theirs.layers[1].mlp_norm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast(tmp_path, dtype):
    decoder = load(make_checkpoint(tmp_path, SPECS[0], dtype=torch.bfloat16), dtype)
    assert decoder._weights.embedding.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_missing_tensor_is_named(tmp_path, spec):
    directory = make_checkpoint(tmp_path, spec)
    whole = load_file(directory / "model.safetensors")
    for name in whole:
        save_file({key: value for key, value in whole.items() if key != name}, directory / "model.safetensors")
        with pytest.raises(ModelError, match=f"model.safetensors: {name}: missing"):
            load(directory)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("spec", [QWEN3_MOE, MIXTRAL, QWEN2_MOE], ids=lambda spec: spec.name)
def test_every_missing_tensor_of_a_layer_with_experts_is_named(tmp_path, spec, stacked):
    directory = make_checkpoint(tmp_path, spec, stacked_experts=stacked)
    whole = load_file(directory / "model.safetensors")
    names = [name for name in whole if name.startswith("model.layers.1.") and re.search("mlp|moe", name)]
    last = "block_sparse_moe.experts.5.w2" if spec is MIXTRAL else "mlp.experts.7.down_proj"
    assert ("model.layers.1.mlp.experts.gate_up_proj" if stacked else f"model.layers.1.{last}.weight") in names
    for name in names:
        save_file({key: value for key, value in whole.items() if key != name}, directory / "model.safetensors")
        with pytest.raises(ModelError, match=f"model.safetensors: {re.escape(name)}: missing"):
            load(directory)


@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.name)
def test_stacked_experts_are_the_same_model(tmp_path, spec):
    """As transformers holds them, and saves them where `save_original_format` is switched off."""
    steps = []
    single = load(make_checkpoint(tmp_path / "single", spec))
    stacked = load(
        make_checkpoint(tmp_path / "stacked", spec, stacked_experts=True), progress=lambda *step: steps.append(step)
    )
    assert steps[-1][0] == steps[-1][1] == len(load_file(tmp_path / "stacked" / "model.safetensors"))
    assert steps[-1][1] < len(load_file(tmp_path / "single" / "model.safetensors"))
    ids, weights = torch.tensor([[0, 2], [1, 2]]), torch.ones(2, 2)
    x_TE = torch.randn(2, spec.hidden)
    for ours, theirs in zip(single._weights.layers, stacked._weights.layers, strict=True):
        if isinstance(ours.mlp, ExpertMlp):
            assert torch.equal(ops.linear(x_TE, ours.mlp.router), ops.linear(x_TE, theirs.mlp.router))
            one, other = (ops.fused_moe(x_TE, layer.mlp.experts, ids, weights) for layer in (ours, theirs))
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("stacked", "name", "shapes"),
    [
        (False, "experts.3.up_proj.weight", (r"\[95, 240\]", r"\[96, 240\]")),
        (False, "experts.3.down_proj.weight", (r"\[239, 96\]", r"\[240, 96\]")),
        (False, "gate.weight", (r"\[7, 240\]", r"\[8, 240\]")),
        (True, "experts.gate_up_proj", (r"\[7, 192, 240\]", r"\[8, 192, 240\]")),
        (True, "experts.down_proj", (r"\[7, 240, 96\]", r"\[8, 240, 96\]")),
    ],
)
def test_a_wrong_shape_of_an_expert_is_named(tmp_path, stacked, name, shapes):
    directory = make_checkpoint(tmp_path, QWEN3_MOE, stacked_experts=stacked)
    whole = f"model.layers.1.mlp.{name}"
    rewrite(directory, lambda tensors: tensors.update({whole: tensors[whole][:-1].clone()}))
    found, wanted = shapes
    with pytest.raises(ModelError, match=f"{re.escape(whole)}: shape {found}, config.json makes it {wanted}"):
        load(directory)


def test_a_wrong_shape_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, SPECS[0])
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ModelError, match=rf"{name}: shape \[255, 240\], config.json makes it \[256, 240\]"):
        load(directory)


def test_tensors_that_nobody_needs_are_left_alone(tmp_path):
    directory = make_checkpoint(tmp_path, SPECS[0])
    rewrite(directory, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    load(directory)


def test_config_that_asks_for_more_layers_than_there_are(tmp_path):
    directory = make_checkpoint(tmp_path, SPECS[0])
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"model.layers.2.input_layernorm.weight: missing"):
        load(directory)
