"""A rank's part of every tensor: the right numbers, in pieces, counted; and no other bytes of the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from safetensors.torch import save_file

from penstock.kernels import ops
from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.weight_reader import Cut, WeightReader
from penstock.workers.parallel.shards import TensorShard

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    shapes = {"a.weight": (96, 40), "b.weight": (32, 40), "o.weight": (40, 96), "long.weight": (3000, 400)}
    biases = {"a.bias": (96,), "b.bias": (32,), "o.bias": (40,), "norm.weight": (40,)}
    return {name: torch.randn(*shape) for name, shape in {**shapes, **biases}.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


def reader(checkpoint, rank=0, width=1, dtype=torch.float32, progress=None):
    return WeightReader(checkpoint, dtype, 9, progress, CPU, TensorShard(rank, width))


def test_cuts():
    assert len(Cut.whole(7)) == 7
    assert Cut(4, range(1, 3)).heads(8) == Cut(32, range(8, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_below_each_other(checkpoint, tensors, dtype):
    columns = Cut(40, range(8, 30))
    parts = {"a.weight": (Cut(96, range(3, 90)), columns), "b.weight": (Cut.whole(32), columns)}
    found = reader(checkpoint, dtype=dtype).fused_parts(parts)
    expected = torch.cat((tensors["a.weight"][3:90, 8:30], tensors["b.weight"][:, 8:30])).to(dtype)
    assert torch.equal(found, expected)


def test_a_tensor_of_many_pieces(checkpoint, tensors):
    whole = reader(checkpoint).fused(["long.weight"], [(3000, 400)])
    assert torch.equal(whole, tensors["long.weight"])
    part = reader(checkpoint).fused_parts({"long.weight": (Cut.whole(3000), Cut(400, range(100, 101)))})
    assert torch.equal(part, tensors["long.weight"][:, 100:101])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_terms_of_all_ranks_add_up_with_one_bias(checkpoint, tensors, width):
    x, total = torch.randn(5, 96), torch.zeros(5, 40)
    for rank in range(width):
        part = TensorShard(rank, width).columns(96)
        weight = reader(checkpoint, rank, width).row_linear("o", 40, Cut(96, part), with_bias=True)
        assert (weight.bias is not None) == (rank == 0)
        total += ops.linear(x[:, part.start : part.stop], weight)
    assert torch.allclose(total, x @ tensors["o.weight"].T + tensors["o.bias"], atol=1e-4)


def test_outputs_of_all_ranks_lie_side_by_side(checkpoint, tensors):
    x = torch.randn(5, 40)
    for rank in range(2):
        cuts = {"a": Cut(96, TensorShard(rank, 2).columns(96)), "b": Cut(32, TensorShard(rank, 2).columns(32))}
        weight = reader(checkpoint, rank, 2).column_linear("", cuts, 40, with_bias=True)
        parts = [tensors[f"{name}.weight"][c.part.start : c.part.stop] for name, c in cuts.items()]
        biases = [tensors[f"{name}.bias"][c.part.start : c.part.stop] for name, c in cuts.items()]
        assert torch.allclose(ops.linear(x, weight), x @ torch.cat(parts).T + torch.cat(biases), atol=1e-4)


def test_every_tensor_counts_once_on_every_rank(checkpoint):
    for rank in range(2):
        steps = []
        one = reader(checkpoint, rank, 2, progress=lambda done, total, steps=steps: steps.append((done, total)))
        one.row_linear("o", 40, Cut(96, TensorShard(rank, 2).columns(96)), with_bias=True)
        one.norm("norm.weight", 40, 1.0)
        assert steps == [(1, 9), (2, 9), (3, 9)]


def test_another_shape_is_named(checkpoint):
    with pytest.raises(ModelError, match=r"a\.weight: shape \[96, 40\], config.json makes it \[97, 40\]"):
        reader(checkpoint).column_linear("", {"a": Cut.whole(97)}, 40, with_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_load_takes_little_more_than_what_it_leaves(tmp_path, family):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    shape = {"heads": 8, "kv_heads": 4, "head_dim": 64, "hidden": 512, "intermediate": 1536, "vocab": 16000}
    changes = json.dumps(experts) if family == "qwen3-moe" else "{}"
    directory = make_checkpoint(tmp_path, CheckpointSpec(family, layers=6, changes=changes, **shape))
    script = Path(__file__).parents[2] / "benchmarks"
    command = [sys.executable, "sharded_load.py", str(directory), "--width", "1,2,4", "--dtype", "float32,bfloat16"]
    done = subprocess.run(command, cwd=script, capture_output=True, text=True, timeout=110, check=True)
    results = json.loads(done.stdout)["results"]
    assert len(results) == 6
    assert max(result["ratio"] for result in results) <= 1.15, results
