"""One tree from file, environment, flags and Python; every mistake is named, every value knows where it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fakes.certificates import Authority

from penstock.cluster.config import (
    ClusterIdentity,
    Sourced,
    build,
    known_keys,
    load_config,
    server_address,
    worker_settings,
)
from penstock.cluster.derived import derive
from penstock.cluster.settings import ClusterConfig, group_settings, value_of, with_value
from penstock.cluster.validation import check_whole
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role
from penstock.workers.settings import GroupSettings, WorkerSettings

ORACLE = {"runner.kind": "oracle"}


def load(file: Path | None = None, environment: dict[str, str] | None = None, **values: Any) -> ClusterConfig:
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return load_config(file=file, environment=environment or {}, values={**ORACLE, **keys})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"weights__copy_dir": "/copies", "weights__serve": False}, "weights.copy_dir", "weights.serve is off"),
        (
            {"weights__source": "disk", "weights__config_from_peer": True},
            "weights.config_from_peer",
            "no peer is asked",
        ),
        (
            {"weights__source": "peer", "runner__model_impl": "transformers"},
            "weights.source",
            "only our own decoders can take weights from peers",
        ),
    ],
)
def test_weights_keys_fit_together(values: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load(**values)
    assert error.value.key == key


def test_every_key() -> None:
    """The whole surface. A new key is a decision: add it here, and to the README's table if users should know it."""
    sections: dict[str, list[str]] = {}
    for key in known_keys():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(name)
    limits = sections.pop("limits")
    router = sections.pop("router")
    assert sections == {
        "runner": (
            "kind model_dir dtype model_impl device graphs graph_sizes record_dir "
            "threads cpus oracle_vocab oracle_step_s oracle_token_s oracle_block_bytes oracle_kv_heads"
        ).split(),
        "scheduler": (
            "max_num_seqs max_num_batched_tokens long_prefill_token_threshold max_model_len max_waiting "
            "reserve_tokens max_preemptions watermark plan_ahead"
        ).split(),
        "kv": (
            "block_size num_blocks memory_bytes gpu_memory_utilization prefix_caching host_bytes disk_path disk_bytes"
        ).split(),
        "transfer": "transport host lease_s digest digest_sample max_frame_bytes socket_buffer_bytes".split(),
        "weights": ("source config_from_peer copy_dir serve max_takers serve_bytes_per_s stall_s patience_s").split(),
        "health": ["heartbeat_s", "router_lease_s", "drain_s", "worker_lease_s"],
        "pools": (
            "prefill decode mixed tensor_parallel_size prefill_tensor_parallel_size decode_tensor_parallel_size "
            "expert_parallel_size context_parallel_size"
        ).split(),
        "ranks": (
            "context_parallel_threshold redundant_experts expert_rebalance_steps lost_experts "
            "start_timeout_s heartbeat_s silence_s slow_factor"
        ).split(),
        "front": (
            "host port grpc_port admin admin_host admin_port served_model_name api_key "
            "api_keys_file enable_tokenizer_info skip_tokenizer_init metrics_aliases tool_call_parser "
            "enable_auto_tool_choice generation_config"
        ).split(),
        "tracing": ["endpoint", "sample_ratio", "service_name", "max_queue", "export_interval_s"],
        "ledger": ["share"],
        "tls": ["cert_file", "key_file", "ca_file", "internal"],
        "adapters": ["directory", "modules", "max_loaded", "max_rank", "host_bytes"],
        "logs": ["format", "level", "access"],
        "ray": (
            "address cluster_name worker_num_cpus worker_num_gpus worker_accelerator_type worker_label_selector "
            "worker_host prefill_resources decode_resources mixed_resources ingress_num_cpus ingress_replicas "
            "max_ingress_per_node"
        ).split(),
    }
    assert all(name.startswith("max_") or name.endswith("_timeout_s") for name in limits)
    assert {name.split(".")[0] for name in router} == {"placement", "admission", "health", "retry", "index", "moves"}


def test_later_layers_win_and_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, "pools: {prefill: 2, decode: 3}\nkv:\n  block_size: 32\nfront: {api_key: from-file}\n")
    config = load_config(
        file=path,
        environment={"PENSTOCK_API_KEY": "from-env"},
        flags={"pools.prefill": Sourced("4", "--prefill")},
        values=ORACLE,
    )
    assert (config.pools.prefill, config.pools.decode, config.kv.block_size) == (4, 3, 32)
    assert config.front.api_key == "from-env"
    assert config.sources["pools.prefill"] == "--prefill"
    assert config.sources["pools.decode"] == str(path)
    assert config.sources["front.api_key"] == "environment PENSTOCK_API_KEY"
    assert config.sources["runner.kind"] == "Python"
    assert "scheduler.max_waiting" not in config.sources
    assert "from-env" not in repr(config)


def test_file_and_python_build_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {admission: {max_waiting: 7, tenant_weights: {a: 2}}}\npools: {mixed: 1}\n")
    by_file = load(path)
    by_hand = load(router__admission__max_waiting="7", router__admission__tenant_weights={"a": 2.0}, pools__mixed=1)
    assert by_file == by_hand
    assert by_file.router.admission.tenant_weights == {"a": 2.0}
    assert by_file.pools.total == 1  # asking for mixed workers alone leaves out the split pair


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv: {blok_size: 16}", "did you mean 'kv.block_size'"),
        ("block_size: 16", "did you mean 'kv.block_size'"),
        ("poools: {prefill: 1}", "did you mean 'pools'"),
        ("router: {admision: {max_waiting: 1}}", "did you mean 'router.admission"),
        ("kv: 5", "kv: expected keys and values"),
        ("- a", "expected keys and values"),
        ("kv: {block_size: sixteen}", "'sixteen' is not of type int"),
        ("kv: {block_size: 16.0}", "16.0 is not of type int"),
        ("kv: {prefix_caching: 3}", "3 is not of type bool"),
        ("kv: {block_size: true}", "True is not of type int"),
        ("front: {served_model_name: [1]}", "1 is not of type str"),
        ("a: [", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("sources: {a: b}", "unknown key 'sources'"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("pools.tensor_parallel_size", 0, "more than zero"),
        ("pools.tensor_parallel_size", 1025, "more than 1024"),
        ("pools.tensor_parallel_size", 2.5, "not of type int"),
        ("pools.prefill_tensor_parallel_size", -1, "zero or more"),
        ("pools.expert_parallel_size", 0, "more than zero"),
        ("ranks.silence_s", 0.4, "would pass between two heartbeats 0.5 s apart"),
        ("ranks.slow_factor", 1, "not above 1"),
        ("ranks.lost_experts", "ignore", "none of refuse, degrade"),
        ("ranks.redundant_experts", -1, "zero or more"),
        ("ranks.start_timeout_s", 0, "more than zero"),
        ("pools.prefill", 0, "decode workers need at least one prefill"),
        ("pools.decode", 0, "prefill workers need at least one decode"),
        ("pools.prefill", -1, "zero or more"),
        ("kv.block_size", 0, "more than zero"),
        ("kv.block_size", 17, "power of two"),
        ("kv.block_size", 2048, "more than 1024"),
        ("kv.num_blocks", 3, "less than one sequence"),
        ("kv.memory_bytes", float("nan"), "not of type int"),
        ("scheduler.watermark", 1.5, "more than 1"),
        ("scheduler.watermark", float("nan"), "zero or more"),
        ("scheduler.max_model_len", "8x", "not of type int"),
        ("scheduler.max_model_len", 1 << 40, "longer than the model's context"),
        ("front.port", 65536, "more than 65535"),
        ("front.host", "example.org", "not an IP address"),
        ("front.api_key", "two words", "without spaces"),
        ("front.served_model_name", [""], "1 to 256"),
        ("runner.dtype", "float8", "none of auto"),
        ("runner.device", "gpu", "none of cpu, cuda, cuda:N, auto"),
        ("runner.device", "cuda:-1", "none of cpu, cuda, cuda:N, auto"),
        ("runner.graph_sizes", [8, 0], "more than zero"),
        ("runner.cpus", [0, 0], "different numbers of cores"),
        ("runner.cpus", [-1], "different numbers of cores"),
        ("kv.gpu_memory_utilization", 1.2, "more than 1"),
        ("kv.gpu_memory_utilization", 0, "more than zero"),
        ("weights.source", "luck", "none of auto, disk, peer"),
        ("weights.max_takers", 0, "more than zero"),
        ("weights.copy_dir", "copies", "must be absolute"),
        ("transfer.transport", "smoke", "none of auto, shared_memory, tcp, nccl"),
        ("transfer.transport", "nccl", "the oracle's blocks are in host memory"),
        ("router.placement.policy", "dice", "none of"),
        ("health.router_lease_s", 0.6, "two heartbeats"),
        ("nothing.at_all", 1, "unknown key"),
    ],
)
def test_wrong_values(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environment={}, values={**ORACLE, key: value})
    assert says in str(caught.value)
    assert caught.value.key == key


def test_steps_fit_every_sequence() -> None:
    assert load(scheduler__max_num_batched_tokens=64).scheduler.max_num_seqs == 64
    with pytest.raises(ConfigError, match="less than max_num_seqs"):
        load(scheduler__max_num_batched_tokens=64, scheduler__max_num_seqs=65)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("1G", 1 << 30), ("2m", 2_000_000), ("+5", 5)],
)
def test_suffixes(text: str, number: int) -> None:
    config = load(kv__memory_bytes=text)
    assert config.kv.memory_bytes == number


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "0x10", "1e3", "1 k", "K8", "nan", "inf", "infk"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ConfigError, match="not of type int"):
        load(kv__memory_bytes=text)


def test_worker_settings_survive_json() -> None:
    config = load(kv__num_blocks=500, scheduler__max_num_seqs=8, health__heartbeat_s=0.25, runner__oracle_vocab=99)
    identity = ClusterIdentity("c1", "ab" * 32)
    told = worker_settings(config, Role.DECODE, 2, identity, incarnation=3, parent_pid=17)
    assert told.worker_id == "decode-2"
    assert (told.role, told.incarnation, told.parent_pid, told.cluster_id) == (Role.DECODE, 3, 17, "c1")
    assert (told.kv.num_blocks, told.scheduler.max_num_seqs, told.heartbeat_s) == (500, 8, 0.25)
    assert WorkerSettings.from_json(told.to_json()) == told
    assert identity.key not in repr(identity)


def test_derived_values_follow_the_model(model_dir: Path) -> None:
    config = load_config(environment={}, values={"runner.model_dir": str(model_dir)})
    assert config.scheduler.max_model_len == 512
    assert config.sources["scheduler.max_model_len"] == "max_position_embeddings of the model"
    assert config.front.served_model_name == ("tiny",)
    assert config.scheduler.max_num_batched_tokens == 512
    assert value_of(config, "runner.threads") >= 1
    stated = load_config(environment={}, values={"runner.model_dir": str(model_dir), "scheduler.max_model_len": 128})
    assert stated.scheduler.max_model_len == 128
    with pytest.raises(ConfigError, match="context of 512"):
        load_config(environment={}, values={"runner.model_dir": str(model_dir), "scheduler.max_model_len": 513})


@pytest.mark.parametrize(
    ("values", "gpus", "num_gpus", "utilization"),
    [
        ({"runner.device": "cpu"}, 8, 0.0, 0.9),
        ({"runner.device": "auto"}, 0, 0.0, 0.9),
        ({"runner.device": "auto"}, 2, 1.0, 0.9),  # one card for each of the pair
        ({"runner.device": "cuda"}, 1, 0.5, 0.45),  # they share one
        ({"runner.device": "cuda"}, 0, 1.0, 0.9),  # nobody knows yet how many there are
        ({"runner.device": "cuda", "pools.prefill": 2}, 2, 0.5, 0.45),  # three on two cards
        ({"runner.device": "cuda", "ray.address": "10.0.0.1:6379"}, 1, 1.0, 0.9),
        ({"runner.device": "cuda", "ray.worker_num_gpus": 0.25}, 1, 0.25, 0.225),
        ({"runner.device": "cuda:1"}, 4, 0.0, 0.45),
        ({"runner.device": "cuda:1", "kv.gpu_memory_utilization": 0.6}, 4, 0.0, 0.6),
    ],
)
def test_what_follows_from_the_device(
    values: dict[str, object], gpus: int, num_gpus: float, utilization: float
) -> None:
    layers = {key: Sourced(value, "here") for key, value in {**ORACLE, **values}.items()}
    config = derive(build(layers), cores=4, gpus=gpus)
    assert config.ray.worker_num_gpus == num_gpus
    assert config.kv.gpu_memory_utilization == pytest.approx(utilization)
    on_gpu = num_gpus > 0 or str(values["runner.device"]).startswith("cuda")
    assert config.scheduler.max_num_batched_tokens == (2048 if on_gpu else 512)
    assert bool(config.runner.record_dir) == on_gpu


def test_sizes_of_recorded_steps_survive_json() -> None:
    config = load(runner__graph_sizes=["4", 2])
    told = worker_settings(config, Role.MIXED, 0, ClusterIdentity("c", ""))
    assert told.runner.graph_sizes == (4, 2)
    assert WorkerSettings.from_json(told.to_json()) == told


def test_server_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_URL", raising=False)
    monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)
    assert server_address() == ("http://127.0.0.1:8000", "")
    monkeypatch.setenv("PENSTOCK_URL", "http://h:1/")
    monkeypatch.setenv("PENSTOCK_API_KEY", "k")
    assert server_address() == ("http://h:1", "k")
    assert server_address("http://x", "") == ("http://x", "")


def test_copies_of_the_attention_are_counted_once() -> None:
    config = load(pools__context_parallel_size=2, pools__expert_parallel_size=2, pools__mixed=1)
    assert (config.pools.ranks, worker_settings(config, Role.MIXED, 0, ClusterIdentity("c", "")).group.width) == (2, 2)
    with pytest.raises(ConfigError, match="speak of the same ranks: equal, or one of them 1") as caught:
        load(pools__context_parallel_size=2, pools__expert_parallel_size=4, pools__mixed=1)
    assert caught.value.key == "pools.context_parallel_size"


def test_whatever_a_group_is_told_can_be_stated() -> None:
    """A new field of a group's settings needs a key, or it is one rank's own."""
    own = {"rank", "host", "leader"}
    fields = {each.name for each in dataclasses.fields(GroupSettings)} - own
    keys = {key.partition(".")[2] for key in known_keys() if key.startswith(("pools.", "ranks."))}
    assert fields <= keys
    assert group_settings(ClusterConfig(), Role.MIXED) == GroupSettings(), "the same defaults"


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"kv__host_bytes": "1G", "kv__prefix_caching": False}, "kv.prefix_caching", "must be on"),
        ({"kv__disk_path": "/kv", "kv__disk_bytes": "1G"}, "kv.host_bytes", "host memory"),
        ({"kv__host_bytes": "1G", "kv__disk_path": "kv", "kv__disk_bytes": "1G"}, "kv.disk_path", "absolute"),
        ({"kv__host_bytes": "1G", "kv__disk_path": "/kv"}, "kv.disk_bytes", "go together"),
        ({"kv__host_bytes": "1G", "kv__disk_bytes": "1G"}, "kv.disk_bytes", "go together"),
        ({"kv__host_bytes": "1G", "pools__decode_tensor_parallel_size": 2}, "kv.host_bytes", "workers of one rank"),
    ],
)
def test_tiers_that_cannot_be(keys: dict[str, object], key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        load(**keys)
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"tls.cert_file": "/c"}, "tls.key_file", "no use without tls.key_file"),
        ({"tls.key_file": "/k"}, "tls.cert_file", "no use without tls.cert_file"),
        ({"tls.ca_file": "/a"}, "tls.cert_file", "no use without tls.cert_file"),
        ({"tls.internal": True}, "tls.ca_file", "needs tls.cert_file, tls.key_file and tls.ca_file"),
        ({"tls.cert_file": "/no/c", "tls.key_file": "/no/k"}, "tls.cert_file", "/no/c: cannot be read: No such file"),
    ],
)
def test_certificates_that_cannot_be(keys: dict[str, object], key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(environment={}, values={**ORACLE, **keys})
    assert error.value.key == key


def test_certificates_of_a_cluster_elsewhere_are_read_there(tmp_path: Path) -> None:
    files = {"tls.cert_file": "/no/c", "tls.key_file": "/no/k", "ray.address": "10.0.0.1:6379"}
    config = load_config(environment={}, values={**ORACLE, **files})
    assert config.scheme == "https"
    assert worker_settings(config, Role.DECODE, 0, ClusterIdentity("c", "00")).tls == config.tls


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"pools.tensor_parallel_size": 2, "runner.oracle_kv_heads": 2}, "ranks of one worker talk in the clear"),
        ({"transfer.transport": "nccl", "runner.kind": "model", "runner.device": "cuda"}, "sends KV in the clear"),
    ],
)
def test_nothing_goes_in_the_clear_where_encryption_was_asked_for(
    tmp_path: Path, more: dict[str, object], reason: str
) -> None:
    tls = Authority(tmp_path).settings()
    files = {"tls.cert_file": tls.cert_file, "tls.key_file": tls.key_file, "tls.ca_file": tls.ca_file}
    tree = build({key: Sourced(value, "Python") for key, value in {**ORACLE, **files, **more}.items()})
    check_whole(tree)
    with pytest.raises(ConfigError, match=reason) as error:
        check_whole(with_value(tree, "tls.internal", True))
    assert error.value.key == "tls.internal"


def test_tiers_below_the_pool() -> None:
    kv = load(kv__host_bytes="1.5G", kv__disk_path="/kv", kv__disk_bytes="10G").kv
    assert (kv.host_bytes, kv.disk_path, kv.disk_bytes) == (3 << 29, "/kv", 10 << 30)
