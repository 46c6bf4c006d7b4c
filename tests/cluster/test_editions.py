"""What makes workers equal, and what they ask Ray for."""

from __future__ import annotations

import json
from typing import Any

from penstock.cluster.config import ClusterIdentity, load_config, worker_settings
from penstock.cluster.editions import Edition, edition_of
from penstock.workers.protocol import Role


def edition(**values: Any) -> Edition:
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return edition_of(load_config(values={"runner.kind": "oracle", **keys}, environment={}))


FOREIGN = {"ray__address": "auto"}


def test_pool_sizes_and_the_front_are_no_part_of_it() -> None:
    same = edition(**FOREIGN)
    assert edition(**FOREIGN, pools__decode=3, front__port=1234, ray__ingress_replicas=2).key == same.key
    assert edition(**FOREIGN, kv__block_size=32).key != same.key
    assert edition(**FOREIGN, ray__worker_num_cpus=2.0).key != same.key
    assert edition(**FOREIGN, ray__decode_resources={"decode": 1}).key != same.key


def test_a_worker_of_it() -> None:
    one = edition(**FOREIGN, kv__block_size=32)
    settings = one.worker("decode-3", Role.DECODE, ClusterIdentity("name", "key"), 7)
    assert (settings.worker_id, settings.role, settings.incarnation) == ("decode-3", Role.DECODE, 7)
    assert (settings.cluster_id, settings.cluster_key, settings.kv.block_size) == ("name", "key", 32)
    assert Edition.from_json(one.to_json()) == one


def test_addresses_are_left_to_the_node_of_a_cluster_that_runs_already() -> None:
    identity = ClusterIdentity("name", "key")
    own = edition().worker("a", Role.MIXED, identity)
    assert (own.host, own.transfer.host) == ("127.0.0.1", "127.0.0.1")
    foreign = edition(**FOREIGN).worker("a", Role.MIXED, identity)
    assert (foreign.host, foreign.transfer.host) == ("", "")
    stated = edition(**FOREIGN, ray__worker_host="10.0.0.7", transfer__host="10.0.1.7").worker(
        "a", Role.MIXED, identity
    )
    assert (stated.host, stated.transfer.host) == ("10.0.0.7", "10.0.1.7")


def test_what_an_actor_asks_for() -> None:
    needs = edition(
        **FOREIGN,
        ray__worker_num_cpus=4.0,
        ray__worker_num_gpus=1.0,
        ray__decode_resources={"decode": 1},
        ray__worker_label_selector={"zone": "a"},
        ray__worker_accelerator_type="L4",
    ).needs
    options = needs.options(Role.DECODE)
    assert options.pop("runtime_env")["env_vars"]["GOMP_SPINCOUNT"]
    assert options == {
        "num_cpus": 4.0,
        "num_gpus": 1.0,
        "resources": {"decode": 1.0},
        "label_selector": {"zone": "a"},
        "accelerator_type": "L4",
    }
    assert needs.amounts(Role.DECODE) == {"CPU": 4.0, "GPU": 1.0, "decode": 1.0}
    assert "resources" not in needs.options(Role.PREFILL)
    assert edition().needs.options(Role.PREFILL) == {"num_cpus": 0.0}, "our own head sets no limit"


def test_each_role_is_told_its_own_group() -> None:
    widths = {"pools__tensor_parallel_size": 2, "pools__decode_tensor_parallel_size": 4, "ranks__silence_s": 3.0}
    widths |= {"ray__worker_num_cpus": 0.01, "ranks__redundant_experts": 2}
    keys = {name.replace("__", "."): value for name, value in widths.items()}
    config = load_config(environment={}, values={"runner.kind": "oracle", **keys})
    identity = ClusterIdentity("name", "key")
    one = edition_of(config)
    for role, width in ((Role.PREFILL, 2), (Role.DECODE, 4), (Role.MIXED, 2)):
        told = one.worker(f"{role.value}-0", role, identity)
        assert (told.group.tensor_parallel_size, told.group.width, told.group.silence_s) == (width, width, 3.0)
        assert told.group.redundant_experts == 2
        assert told.group == worker_settings(config, role, 0, identity).group
    assert Edition.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert edition(**widths, pools__expert_parallel_size=2).key != one.key != edition().key
    foreign = edition(**FOREIGN, **widths).worker("a", Role.MIXED, identity)
    assert foreign.group.host == "", "left to the node"
