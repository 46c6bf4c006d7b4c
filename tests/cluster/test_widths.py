"""Which widths a configuration may ask for: what the model, the other pool and the machine allow, with the numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.config import load_config
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.cluster.settings import ClusterConfig, PoolSettings
from penstock.cluster.widths import check_host, check_nodes, ranks_in_words, times
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role

ORACLE = {"runner.kind": "oracle", "ray.address": "auto"}  # judged by no machine


def load(values: Mapping[str, Any]) -> ClusterConfig:
    return load_config(environment={}, values=values)


def refused(values: Mapping[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(values)
    return caught.value


def mixture(tmp_path: Path, experts: int) -> str:
    """A model directory that says it has experts; nobody reads its weights."""
    folder = tmp_path / "mixture"
    shutil.copytree(EMBEDDED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_roles_have_their_own_widths() -> None:
    pools = PoolSettings(2, 1, 1, tensor_parallel_size=2, decode_tensor_parallel_size=4, expert_parallel_size=3)
    assert [pools.tensor_width(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)] == [2, 4, 2]
    assert [pools.width(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)] == [6, 12, 6]
    assert (pools.total, pools.ranks, pools.widest) == (4, 30, 12)
    words = "30 ranks (2 prefill workers of 6, 1 decode worker of 12, 1 mixed worker of 6)"
    assert ranks_in_words(pools) == words
    assert PoolSettings().widest == 1


@pytest.mark.parametrize(
    ("key", "width", "says"),
    [
        (
            "pools.tensor_parallel_size",
            3,
            "3: does not divide the 4 attention heads; this model can be cut for 1, 2, 4",
        ),
        ("pools.decode_tensor_parallel_size", 8, "8: does not divide the 4 attention heads"),
        ("pools.expert_parallel_size", 2, "has no experts that ranks could share; only 1 would fit"),
    ],
)
def test_what_the_model_cannot_be(key: str, width: int, says: str) -> None:
    error = refused({key: width})
    assert error.key == key
    assert str(error).startswith(f"{key} (from Python): ")
    assert says in str(error)


def test_experts_are_shared_out_whole(tmp_path: Path) -> None:
    model = {"runner.model_dir": mixture(tmp_path, 6), "ray.address": "auto"}
    assert load({**model, "pools.expert_parallel_size": 3}).pools.ranks == 6
    assert "4 does not divide the 6 experts of a layer; 1, 2, 3, 6 would fit" in str(
        refused({**model, "pools.expert_parallel_size": 4})
    )


def test_pools_that_cannot_exchange_kv() -> None:
    error = refused({**ORACLE, "pools.prefill_tensor_parallel_size": 4, "pools.decode_tensor_parallel_size": 6})
    assert error.key == "pools.decode_tensor_parallel_size"
    assert "widths 4 and 6: neither divides the other; beside prefill workers of 4 would fit 1, 2, 4, 8" in str(error)
    mixed = {"pools.decode": 0, "pools.prefill": 1, "pools.mixed": 1, "pools.prefill_tensor_parallel_size": 2}
    assert refused({**ORACLE, **mixed, "pools.tensor_parallel_size": 3}).key == "pools.tensor_parallel_size"
    config = load({**ORACLE, "pools.prefill_tensor_parallel_size": 4, "pools.decode_tensor_parallel_size": 2})
    assert config.runner.oracle_kv_heads == 4, "both know the same heads"
    assert load({**ORACLE, "pools.tensor_parallel_size": 6}).runner.oracle_kv_heads == 0


def test_more_ranks_than_this_host_has_room_for() -> None:
    config = load({**ORACLE, "pools.tensor_parallel_size": 16})
    with pytest.raises(ConfigError) as caught:
        check_host(config, cores=2, gpus=0)
    assert "32 ranks (1 prefill worker of 16, 1 decode worker of 16) of 1 CPU" not in str(caught.value)
    assert "of 0.25 CPU each need 8, and this host has 2: 6 are missing; 8 ranks would fit: 2 workers of at most 4" in (
        str(caught.value)
    )
    assert caught.value.key == "pools.tensor_parallel_size"
    check_host(config, cores=8, gpus=0)
    check_host(load({**ORACLE, "pools.decode": 999}), cores=1, gpus=0)  # no group: threads are shared as before


def test_more_ranks_than_gpus() -> None:
    config = load({**ORACLE, "runner.device": "cuda", "pools.mixed": 1, "pools.tensor_parallel_size": 4})
    with pytest.raises(ConfigError, match=r"of 1 GPU each need 4, and this host has 2: 2 are missing; 2 ranks would"):
        check_host(config, cores=64, gpus=2)
    with pytest.raises(ConfigError, match=r"/dev/shm has 64 MiB free, and NCCL takes up to 128 MiB .* at most 2 ranks"):
        check_host(config, cores=64, gpus=4, shared_bytes=64 << 20)
    check_host(config, cores=64, gpus=4, shared_bytes=1 << 30)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("runner.device", "cuda:0", "cuda:0 is one GPU for all of 2 ranks (1 mixed worker of 2); say cuda"),
        ("ray.worker_num_gpus", 0.5, "0.5: the ranks of one worker cannot share a GPU"),
    ],
)
def test_ranks_do_not_share_a_gpu(key: str, value: object, says: str) -> None:
    error = refused({**ORACLE, "runner.device": "cuda", "pools.mixed": 1, "pools.tensor_parallel_size": 2, key: value})
    assert error.key == key
    assert says in str(error)


def test_more_ranks_than_a_ray_cluster_has() -> None:
    config = load({**ORACLE, "pools.decode_tensor_parallel_size": 4, "ray.decode_resources": {"fast": 1}})
    nodes = [{"CPU": 8.0, "fast": 2.0}, {"CPU": 8.0, "fast": 1.0}, {"CPU": 64.0}]
    with pytest.raises(ConfigError) as caught:
        check_nodes(config, nodes)
    assert caught.value.key == "pools.decode_tensor_parallel_size"
    assert "one decode worker of 4 ranks, each of 0.25 CPU, 1 fast on one node, finds no room" in str(caught.value)
    assert "4 fast are needed, the nodes have 3; 3 such ranks would fit" in str(caught.value)
    check_nodes(config, [*nodes, {"CPU": 1.0, "fast": 1.0}])
    with pytest.raises(ConfigError, match="no nodes have that together; 0 such"):
        check_nodes(config, [{"CPU": 1.0}, {"fast": 4.0}])


def test_how_often_a_node_holds_a_rank() -> None:
    assert times({"CPU": 1.0, "GPU": 2.0}, {"CPU": 0.1, "GPU": 1.0}) == 2
    assert times({"CPU": 0.3}, {"CPU": 0.1}) == 3, "0.3 / 0.1 is 2.99… in floats"
    assert times({"CPU": 4.0}, {"GPU": 1.0}) == 0
    assert times({}, {}) > 1000
