"""Model directories: single and sharded weights, index traps, pickles, symbolic links."""

import json

import pytest
import torch
from safetensors.torch import save_file

from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint import Checkpoint


def sharded(directory, shards, weight_map=None):
    """Write config, shards {file: {tensor: value}} and an index, by default the true one."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places if weight_map is None else weight_map})
    )
    return directory


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two(directory, **options):
    return sharded(directory, {A: {"a": torch.ones(2)}, B: {"b": torch.zeros(3)}}, **options)


def test_shards_are_read_through_the_index(tmp_path):
    checkpoint = Checkpoint(two(tmp_path))
    assert torch.equal(checkpoint.read("a", (2,)), torch.ones(2))
    assert torch.equal(checkpoint.read("b", (3,)), torch.zeros(3))
    assert "a" in checkpoint
    assert "c" not in checkpoint


def test_the_single_file_comes_first(tmp_path):
    two(tmp_path)
    save_file({"a": torch.full((2,), 7.0)}, tmp_path / "model.safetensors")
    assert float(Checkpoint(tmp_path).read("a", (2,))[0]) == 7


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin", ".safetensors", 3, None],
)
def test_names_that_are_no_plain_file_names(tmp_path, name):
    two(tmp_path, weight_map={"a": name})
    with pytest.raises(ModelError, match=r"weight_map.a: .* is not a plain .safetensors file name"):
        Checkpoint(tmp_path)


def test_missing_shard_names_the_file(tmp_path):
    two(tmp_path)
    (tmp_path / B).unlink()
    with pytest.raises(ModelError, match=f"{B}: missing, though model.safetensors.index.json names it"):
        Checkpoint(tmp_path)


def test_tensor_not_in_its_shard(tmp_path):
    two(tmp_path, weight_map={"a": A, "b": A})
    with pytest.raises(ModelError, match=f"{A}: b: missing, though"):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    shards = {A: {"a": torch.ones(2)}, B: {"b": torch.zeros(3), "a": torch.zeros(2)}}
    sharded(tmp_path, shards, weight_map={"a": A, "b": B})
    with pytest.raises(ModelError, match=f"{B}: a: also in {A}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_broken_index(tmp_path, content):
    two(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json: (not JSON|weight_map: missing)"):
        Checkpoint(tmp_path)


def test_links_out_of_the_directory_are_refused_but_the_hub_cache_is_not(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="leads out of the model directory"):
        Checkpoint(plain)

    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    outside.rename(blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert "a" in Checkpoint(snapshot)


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: pickled weights are not opened"):
        Checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ModelError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        Checkpoint(tmp_path)


def test_errors_of_read_name_file_and_tensor(tmp_path):
    sharded(tmp_path, {A: {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}})
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"index.json: z: missing"):
        checkpoint.read("z", (1,))
    with pytest.raises(ModelError, match=rf"{A}: a: shape \[2\], config.json makes it \[3\]"):
        checkpoint.read("a", (3,))
    with pytest.raises(ModelError, match=f"{A}: n: dtype torch.int64 is not floating point"):
        checkpoint.read("n", (2,))


def test_revision_follows_config_and_weights_only(tmp_path):
    first = Checkpoint(two(tmp_path / "one")).revision
    assert Checkpoint(two(tmp_path / "two")).revision == first
    (tmp_path / "two" / "config.json").write_text('{"x": 1}')
    assert Checkpoint(tmp_path / "two").revision != first
    changed = sharded(tmp_path / "three", {A: {"a": torch.ones(2)}, B: {"b": torch.ones(3)}})
    assert Checkpoint(changed).revision != first
