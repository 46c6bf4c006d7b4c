"""Checks of a configuration that no single type can express: ranges, choices, and keys against each other.

Called by `config.load_config`, once for single values and once, when everything is derived, for the whole. Raises
ConfigError naming the key and where its value came from. Nothing is repaired silently.
"""

from __future__ import annotations

import ipaddress
import math
import re
from pathlib import Path
from urllib.parse import urlsplit

from penstock.cluster.key_file import read_key_file
from penstock.cluster.settings import ClusterConfig, PoolSettings, group_settings, value_of, wrong
from penstock.cluster.tool_calls.formats import FORMATS
from penstock.router.placement import POLICIES
from penstock.workers.errors import ConfigError
from penstock.workers.parallel.shards import MOST_RANKS
from penstock.workers.protocol import Role
from penstock.workers.settings import DEVICE_NAME, LOST_EXPERTS, PLAN_AHEAD, WEIGHT_SOURCES

CHOICES = {
    "runner.kind": ("model", "oracle"),
    "runner.dtype": ("auto", "float32", "bfloat16", "float16"),
    "runner.model_impl": ("auto", "penstock", "transformers"),
    "front.admin": ("apart", "shared"),
    "front.tool_call_parser": ("auto", *FORMATS),
    "front.generation_config": ("auto", "vllm", "none"),
    "transfer.transport": ("auto", "shared_memory", "tcp", "nccl"),
    "weights.source": WEIGHT_SOURCES,
    "transfer.digest": ("auto", "full", "sampled", "off"),
    "router.placement.policy": tuple(POLICIES),
    "front.metrics_aliases": ("vllm", "none"),
    "ranks.lost_experts": LOST_EXPERTS,
    "scheduler.plan_ahead": PLAN_AHEAD,
    "logs.format": ("text", "json"),
    "logs.level": ("debug", "info", "warning", "error"),
}
MAY_BE_ZERO = frozenset(
    {
        "scheduler.long_prefill_token_threshold",
        "scheduler.reserve_tokens",
        "scheduler.max_preemptions",
        "scheduler.watermark",
        "kv.num_blocks",
        "kv.host_bytes",
        "kv.disk_bytes",
        "transfer.socket_buffer_bytes",
        "runner.oracle_step_s",
        "runner.oracle_token_s",
        "runner.oracle_block_bytes",
        "runner.oracle_kv_heads",
        "pools.prefill",
        "pools.decode",
        "pools.mixed",
        "pools.prefill_tensor_parallel_size",
        "pools.decode_tensor_parallel_size",
        "ranks.context_parallel_threshold",
        "ranks.redundant_experts",
        "ranks.expert_rebalance_steps",
        "front.port",
        "front.grpc_port",
        "front.admin_port",
        "router.placement.local_prefill_tokens",
        "router.placement.local_penalty",
        "router.placement.handover_tokens",
        "router.placement.balance",
        "router.placement.sample",
        "router.admission.tpot_target_s",
        "router.admission.input_weight",
        "router.admission.output_weight",
        "router.retry.grant_patience_s",
        "router.retry.handover_grace_s",
        "router.retry.sibling_wait_s",
        "router.retry.first_backoff_s",
        "router.retry.budget_share",
        "router.retry.max_internal_failures",
        "router.retry.poison_clear_tokens",
        "router.index.assume_s",
        "tracing.sample_ratio",
        "ledger.share",
        "adapters.host_bytes",
        "ray.worker_num_cpus",
        "ray.worker_num_gpus",
        "ray.max_ingress_per_node",
        "ray.ingress_num_cpus",
    }
)
UPPER = {
    "front.port": 65535,
    "front.grpc_port": 65535,
    "front.admin_port": 65535,
    "kv.block_size": 1024,
    "kv.gpu_memory_utilization": 1,
    "limits.max_logprobs": 20,
    "scheduler.watermark": 1,
    "transfer.digest_sample": 1,
    "tracing.sample_ratio": 1,
    "ledger.share": 1,
    "pools.prefill": 1024,
    "pools.decode": 1024,
    "pools.mixed": 1024,
    "pools.tensor_parallel_size": MOST_RANKS,
    "pools.prefill_tensor_parallel_size": MOST_RANKS,
    "pools.decode_tensor_parallel_size": MOST_RANKS,
    "pools.expert_parallel_size": MOST_RANKS,
    "pools.context_parallel_size": MOST_RANKS,
}
MAX_NAME_CHARS = 256
NO_CUSTOM_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
RAY_ADDRESS = re.compile(r"auto|local|(ray://)?([^\s:/]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
CLUSTER_NAME = re.compile(r"[A-Za-z0-9._-]{0,64}")


def check_values(config: ClusterConfig, keys: list[str]) -> ClusterConfig:
    """Each value by itself: finite, in range, one of its choices."""
    for key in keys:
        value = value_of(config, key)
        if key in CHOICES and value not in CHOICES[key]:
            raise wrong(config, key, f"{value!r} is none of {', '.join(CHOICES[key])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _number(config, key, value)
    _device(config)
    return config


def _device(config: ClusterConfig) -> None:
    """The name of a device, sizes of captured steps, cores; whether all that is there only its worker can know."""
    runner = config.runner
    if not DEVICE_NAME.fullmatch(runner.device):
        raise wrong(config, "runner.device", f"{runner.device!r} is none of cpu, cuda, cuda:N, auto")
    if any(size < 1 for size in runner.graph_sizes):
        raise wrong(config, "runner.graph_sizes", f"{runner.graph_sizes!r} must all be more than zero")
    if any(core < 0 for core in runner.cpus) or len(set(runner.cpus)) < len(runner.cpus):
        raise wrong(config, "runner.cpus", f"{runner.cpus!r} must be different numbers of cores, zero or more")


def check_whole(config: ClusterConfig) -> ClusterConfig:
    """The keys against each other, after everything has been derived."""
    _pools(config)
    _group(config)
    _tiers(config)
    _transport(config)
    _ray(config)
    _sizes(config)
    _front(config)
    _tracing(config)
    _weights(config)
    _tls(config)
    return config


def _number(config: ClusterConfig, key: str, value: float) -> None:
    zero_is_fine = key in MAY_BE_ZERO
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_is_fine):
        raise wrong(config, key, f"{value!r} must be {'zero or more' if zero_is_fine else 'more than zero'}")
    if value > UPPER.get(key, math.inf):
        raise wrong(config, key, f"{value!r} is more than {UPPER[key]}")


def pools_problem(pools: PoolSettings) -> tuple[str, str] | None:
    """The key and the reason why pools of these sizes could serve nothing; asked also before running ones change."""
    for name in ("prefill", "decode", "mixed"):
        if not 0 <= getattr(pools, name) <= UPPER[f"pools.{name}"]:
            return f"pools.{name}", f"must be 0 to {UPPER[f'pools.{name}']}"
    if pools.total == 0:
        return "pools.mixed", "there is no worker at all; ask for mixed, or for prefill and decode ones"
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if getattr(pools, role) and not getattr(pools, other) and not pools.mixed:
            return f"pools.{other}", f"{role} workers need at least one {other} or mixed worker"
    return None


def _pools(config: ClusterConfig) -> None:
    problem = pools_problem(config.pools)
    if problem is not None:
        raise wrong(config, *problem)


def _group(config: ClusterConfig) -> None:
    """A group's sizes and times, as its ranks will judge them."""
    try:
        group_settings(config, Role.MIXED).check()
    except ConfigError as error:
        name = str(error.key).removeprefix("group.")
        section = "pools" if hasattr(config.pools, name) else "ranks"
        raise wrong(config, f"{section}.{name}", str(error)) from error


def _tiers(config: ClusterConfig) -> None:
    """Host memory and disk below the pools; the ranks of a group would each hold a slice, which is not built."""
    try:
        config.kv.check_tiers()
    except ConfigError as error:
        raise wrong(config, str(error.key), str(error)) from error
    widths = [group_settings(config, role).width for role in Role]
    if config.kv.host_bytes and max(widths) > 1:
        reason = f"the KV host tier is for workers of one rank, and some here have {max(widths)}; set it to 0"
        raise wrong(config, "kv.host_bytes", reason)


def _transport(config: ClusterConfig) -> None:
    """NCCL moves blocks between GPUs; whether there is one, and an NCCL, only a worker can know."""
    runner = config.runner
    if config.transfer.transport == "nccl" and (runner.kind == "oracle" or runner.device == "cpu"):
        where = "the oracle's blocks are" if runner.kind == "oracle" else "with runner.device cpu blocks are"
        raise wrong(config, "transfer.transport", f"'nccl' moves blocks between GPUs; {where} in host memory")


def _ray(config: ClusterConfig) -> None:
    ray = config.ray
    if ray.worker_host:
        try:
            ipaddress.ip_address(ray.worker_host)
        except ValueError as error:
            raise wrong(config, "ray.worker_host", f"{ray.worker_host!r} is not an IP address") from error
    for key in ("ray.prefill_resources", "ray.decode_resources", "ray.mixed_resources"):
        for name, amount in value_of(config, key).items():
            if not name or not math.isfinite(amount) or amount <= 0:
                raise wrong(config, key, f"{name!r}: {amount!r} must be more than zero")
            if name in NO_CUSTOM_RESOURCES:
                raise wrong(config, key, f"{name} is no custom resource; Ray refuses it here")
    if ray.address and not RAY_ADDRESS.fullmatch(ray.address):
        raise wrong(config, "ray.address", f"{ray.address!r} is neither auto nor host:port")
    if not CLUSTER_NAME.fullmatch(ray.cluster_name):
        raise wrong(config, "ray.cluster_name", "letters, digits, '.', '_' and '-' only, at most 64")


def _tracing(config: ClusterConfig) -> None:
    parts = urlsplit(config.tracing.endpoint)
    if config.tracing.endpoint and not (parts.scheme in ("http", "https") and parts.hostname):
        reason = f"{config.tracing.endpoint!r} is no http(s) URL; spans go by OTLP over HTTP (port 4318, usually)"
        raise wrong(config, "tracing.endpoint", reason)


def _weights(config: ClusterConfig) -> None:
    weights = config.weights
    if weights.copy_dir and not Path(weights.copy_dir).is_absolute():
        raise wrong(config, "weights.copy_dir", f"{weights.copy_dir!r} must be absolute: each worker has its own place")
    if weights.copy_dir and not weights.serve:
        raise wrong(config, "weights.copy_dir", "a copy is kept to be served, and weights.serve is off")
    if weights.config_from_peer and weights.source == "disk":
        raise wrong(config, "weights.config_from_peer", "no peer is asked for anything while weights.source is disk")
    if weights.source == "peer" and config.runner.model_impl == "transformers":
        reason = "transformers reads the model directory itself; only our own decoders can take weights from peers"
        raise wrong(config, "weights.source", reason)


def _tls(config: ClusterConfig) -> None:
    """Which files there must be, and what would go between processes in the clear; what is in them, its readers say."""
    try:
        config.tls.check()
    except ConfigError as error:
        raise wrong(config, str(error.key), str(error)) from error
    if config.tls.internal and config.pools.widest > 1:
        reason = f"ranks of one worker talk in the clear, and some here have {config.pools.widest}; only for one rank"
        raise wrong(config, "tls.internal", reason)
    if config.tls.internal and config.transfer.transport == "nccl":
        raise wrong(config, "tls.internal", "transfer.transport 'nccl' sends KV in the clear; set it to tcp or auto")


def _sizes(config: ClusterConfig) -> None:
    scheduler, kv, runner = config.scheduler, config.kv, config.runner
    if runner.cpus and runner.threads > len(runner.cpus):
        raise wrong(config, "runner.threads", f"{runner.threads} is more than the {len(runner.cpus)} of runner.cpus")
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise wrong(
            config,
            "scheduler.max_num_batched_tokens",
            f"{scheduler.max_num_batched_tokens} is less than max_num_seqs {scheduler.max_num_seqs}; a step must fit "
            "one token of every sequence",
        )
    if kv.block_size & (kv.block_size - 1):
        raise wrong(config, "kv.block_size", f"{kv.block_size} is not a power of two")
    if kv.num_blocks and kv.num_blocks * kv.block_size < scheduler.max_model_len:
        raise wrong(
            config,
            "kv.num_blocks",
            f"{kv.num_blocks} blocks of {kv.block_size} tokens hold less than one sequence of max_model_len "
            f"{scheduler.max_model_len}",
        )
    if config.health.heartbeat_s * 2 > config.health.router_lease_s:
        raise wrong(config, "health.router_lease_s", "must be at least two heartbeats")
    if config.health.worker_lease_s < 10:
        raise wrong(config, "health.worker_lease_s", "must be at least 10 seconds")


def _front(config: ClusterConfig) -> None:
    front = config.front
    if any(not name or len(name) > MAX_NAME_CHARS or not name.isprintable() for name in front.served_model_name):
        raise wrong(config, "front.served_model_name", f"each must be 1 to {MAX_NAME_CHARS} printable characters")
    for key in ("front.host", "front.admin_host"):
        host = value_of(config, key)
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError as error:
                raise wrong(config, key, f"{host!r} is not an IP address") from error
    if front.admin == "apart" and front.operators_port in {front.port, front.grpc_port} - {0}:
        reason = f"{front.operators_port} is the port of another listener; state one that is free"
        raise wrong(config, "front.admin_port", reason)
    if front.operators_port > UPPER["front.admin_port"]:
        raise wrong(config, "front.admin_port", "there is no port after front.port; state one")
    if front.grpc_port and front.grpc_port == front.port:
        raise wrong(config, "front.grpc_port", f"{front.grpc_port} is the HTTP server's port")
    if front.api_keys_file:
        read_key_file(Path(front.api_keys_file))
    if not front.api_key.isascii() or any(c.isspace() for c in front.api_key):
        raise wrong(config, "front.api_key", "must be ASCII without spaces")
