"""Loading latent attention: every tensor is counted and missed by name, the published names included."""

import re

import pytest
import torch
from fakes.exactness import make_checkpoint
from fakes.latent_specs import latent_specs
from safetensors.torch import load_file, save_file

from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import read_config
from penstock.workers.model.loading import load_decoder

SPECS = latent_specs()


def load(directory, dtype="float32", progress=None):
    return load_decoder(read_config(directory), Checkpoint(directory), dtype, 64, progress)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_progress_reaches_the_total(tmp_path, spec, stacked):
    steps = []
    load(make_checkpoint(tmp_path, spec, stacked_experts=stacked), progress=lambda *step: steps.append(step))
    done = [step for step, _ in steps]
    assert done == sorted(set(done))  # both stacked tensors of a layer may come at once
    assert {total for _, total in steps} == {steps[-1][1]}
    assert steps[-1][0] == steps[-1][1] == len(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3]], ids=lambda spec: spec.name)
def test_every_missing_tensor_is_named(tmp_path, spec):
    directory = make_checkpoint(tmp_path, spec)
    whole = load_file(directory / "model.safetensors")
    last = f"model.layers.{spec.layers - 1}."
    names = [name for name in whole if name.startswith(last) and not re.search(r"experts\.(?!0\.)\d", name)]
    assert last + "self_attn.kv_a_proj_with_mqa.weight" in names
    assert (last + "mlp.gate.e_score_correction_bias" in names) == (spec.family == "deepseek-v3")
    for name in names:
        save_file({key: value for key, value in whole.items() if key != name}, directory / "model.safetensors")
        with pytest.raises(ModelError, match=f"model.safetensors: {re.escape(name)}: missing"):
            load(directory)


def test_a_wrong_shape_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, SPECS[2])
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}: shape \[639, 96\], config.json makes it \[640, 96\]"):
        load(directory)


def test_layers_beyond_the_model_are_left_alone(tmp_path):
    """Published checkpoints bring a layer that predicts further tokens."""
    directory = make_checkpoint(tmp_path, SPECS[2])
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.self_attn.kv_b_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, directory / "model.safetensors")
    load(directory)


def test_router_and_choice_stay_float32_in_a_narrow_model(tmp_path):
    decoder = load(make_checkpoint(tmp_path, SPECS[2]), "bfloat16")
    mlp = decoder._weights.layers[1].mlp
    assert mlp.router.weight.dtype == mlp.selection_bias.dtype == torch.float32
    assert decoder._weights.layers[1].qkv.key_up.dtype == torch.bfloat16
    assert mlp.selection_bias.std() > 0.01
