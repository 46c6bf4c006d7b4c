"""Whether groups of the widths that a configuration asks for can be: for its model, between its pools, on a host.

`derived.py` asks for the model and the pools, `config.py` for this host, `launch.py` for the nodes of a Ray cluster.
Refusals say the numbers and what would fit. Starts nothing, and needs neither torch nor Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from penstock.cluster.model_directory import ModelDescription
from penstock.cluster.settings import ClusterConfig, PoolSettings, wrong
from penstock.workers.errors import ConfigError
from penstock.workers.model.config import DecoderConfig
from penstock.workers.model.tensor_widths import require_tensor_width
from penstock.workers.oracle import oracle_heads
from penstock.workers.parallel.shards import KEY
from penstock.workers.protocol import Role
from penstock.workers.transfer.head_slices import reason_against

SHARED_MEMORY = Path("/dev/shm")
# What NCCL puts into /dev/shm for the ranks of one host, by rank: buffers of 4 MiB for some channels, and proxies.
NCCL_SHARED_BYTES = 32 << 20
_SHOWN = 8  # fitting numbers in a message


def check_widths(config: ClusterConfig, model: ModelDescription) -> None:
    """Raises ConfigError for widths that this model cannot be cut for, or that cannot exchange KV with each other."""
    _check_pairs(config)
    for role in _roles(config.pools):
        _check_tensor_width(config, model, role)
    _check_experts(config, model)
    _check_device(config)


def check_host(config: ClusterConfig, cores: int, gpus: int, shared_bytes: int | None = None) -> None:
    """Raises ConfigError where this host has too little for the ranks of groups; workers of one rank are not judged.

    `gpus` that the driver serves; `shared_bytes` are free in /dev/shm (None: look).
    """
    pools, ray = config.pools, config.ray
    if pools.widest == 1:
        return
    on_gpu = config.runner.device.startswith("cuda") or (config.runner.device == "auto" and gpus > 0)
    each, there, name = (ray.worker_num_gpus or 1.0, gpus, "GPU") if on_gpu else (ray.worker_num_cpus, cores, "CPU")
    if pools.ranks * each > there:
        fit = math.floor(there / each)
        raise wrong(
            config,
            _widest_key(config),
            f"{ranks_in_words(pools)} of {each:g} {name} each need {pools.ranks * each:g}, and this host has {there}: "
            f"{pools.ranks * each - there:g} are missing; {fit} ranks would fit: {_fitting(pools, fit)}",
        )
    if on_gpu:
        _check_shared_memory(config, shared_bytes)


def check_nodes(config: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """The same for the nodes of a Ray cluster, each with all its resources, free or in use."""
    pools, ray = config.pools, config.ray
    own = {Role.PREFILL: ray.prefill_resources, Role.DECODE: ray.decode_resources, Role.MIXED: ray.mixed_resources}
    for role in _roles(pools):
        each = {"CPU": ray.worker_num_cpus, "GPU": ray.worker_num_gpus, **own[role]}
        each = {name: amount for name, amount in each.items() if amount}
        width, fit = pools.width(role), sum(times(node, each) for node in nodes)
        if width == 1 or width <= fit:
            continue
        missing = [
            f"{width * amount:g} {name} are needed, the nodes have {sum(node.get(name, 0.0) for node in nodes):g}"
            for name, amount in each.items()
            if width * amount > sum(node.get(name, 0.0) for node in nodes)
        ]
        raise wrong(
            config,
            _key(config, role),
            f"one {role.value} worker of {width} ranks, each of {words_of(each)} on one node, finds no room: "
            f"{'; '.join(missing) or 'no nodes have that together'}; {fit} such ranks would fit",
        )


def times(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many ranks that need `each` a node of these resources holds; a large number where they need nothing."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in each.items()), default=1 << 20)


def words_of(each: Mapping[str, float]) -> str:
    """Resources of one rank in words."""
    return ", ".join(f"{amount:g} {name}" for name, amount in each.items()) or "a process"


def ranks_in_words(pools: PoolSettings) -> str:
    """Such as `6 ranks (1 prefill worker of 2, 1 decode worker of 4)`."""
    parts = [
        f"{pools.count(role)} {role.value} worker{'s' if pools.count(role) > 1 else ''} of {pools.width(role)}"
        for role in _roles(pools)
    ]
    return f"{pools.ranks} ranks ({', '.join(parts)})"


def _roles(pools: PoolSettings) -> list[Role]:
    return [role for role in Role if pools.count(role)]


def _key(config: ClusterConfig, role: Role) -> str:
    """The key that says how wide workers of this role are."""
    own = {Role.PREFILL: "pools.prefill_tensor_parallel_size", Role.DECODE: "pools.decode_tensor_parallel_size"}
    stated = config.pools.tensor_width(role) != config.pools.tensor_parallel_size or own.get(role) in config.sources
    return own[role] if role in own and stated else "pools.tensor_parallel_size"


def _widest_key(config: ClusterConfig) -> str:
    pools = config.pools
    widest = max(_roles(pools), key=pools.tensor_width)
    if pools.tensor_width(widest) > 1:
        return _key(config, widest)
    return "pools.expert_parallel_size" if pools.expert_parallel_size > 1 else "pools.context_parallel_size"


def _check_pairs(config: ClusterConfig) -> None:
    """Prefill workers hand over to decode workers, and to mixed ones where there are no others."""
    pools = config.pools
    if not pools.prefill:
        return
    for role in (Role.DECODE, Role.MIXED):
        own, other = pools.tensor_width(role), pools.tensor_width(Role.PREFILL)
        reason = reason_against(other, own) if pools.count(role) else None
        if reason is not None:
            fit = [each for each in range(1, 4 * other + 1) if reason_against(other, each) is None][:_SHOWN]
            raise wrong(
                config,
                _key(config, role),
                f"prefill and {role.value} workers cannot exchange KV: {reason}; beside prefill workers of {other} "
                f"would fit {', '.join(map(str, fit))}",
            )


def _check_tensor_width(config: ClusterConfig, model: ModelDescription, role: Role) -> None:
    try:
        if model.architecture is not None:
            require_tensor_width(model.architecture, config.pools.tensor_width(role))
        elif config.runner.kind == "oracle":
            oracle_heads(config.runner, config.pools.width(role))
    except ConfigError as error:
        raise wrong(config, _key(config, role), str(error).removeprefix(f"{KEY} ")) from error


def _check_experts(config: ClusterConfig, model: ModelDescription) -> None:
    key, width = "pools.expert_parallel_size", config.pools.expert_parallel_size
    if width == 1 or model.architecture is None:
        return
    how = model.architecture.experts if isinstance(model.architecture, DecoderConfig) else None
    if how is None:
        name = model.architecture.architecture
        raise wrong(config, key, f"{width}: {name} has no experts that ranks could share; only 1 would fit")
    if how.count % width:
        fit = ", ".join(str(each) for each in range(1, how.count + 1) if how.count % each == 0)
        raise wrong(config, key, f"{width} does not divide the {how.count} experts of a layer; {fit} would fit")


def _check_device(config: ClusterConfig) -> None:
    pools, device = config.pools, config.runner.device
    if pools.widest > 1 and ":" in device:
        raise wrong(config, "runner.device", f"{device} is one GPU for all of {ranks_in_words(pools)}; say cuda")
    if pools.widest > 1 and 0 < config.ray.worker_num_gpus < 1:
        reason = f"{config.ray.worker_num_gpus:g}: the ranks of one worker cannot share a GPU; each needs 1"
        raise wrong(config, "ray.worker_num_gpus", reason)


def _check_shared_memory(config: ClusterConfig, shared_bytes: int | None) -> None:
    if shared_bytes is None:
        shared_bytes = _free_bytes(SHARED_MEMORY)
    needed = config.pools.ranks * NCCL_SHARED_BYTES
    if shared_bytes < needed:
        raise wrong(
            config,
            _widest_key(config),
            f"{SHARED_MEMORY} has {shared_bytes >> 20} MiB free, and NCCL takes up to {needed >> 20} MiB there for "
            f"{ranks_in_words(config.pools)}; enlarge it (--shm-size, or an emptyDir in memory), or use at most "
            f"{shared_bytes // NCCL_SHARED_BYTES} ranks",
        )


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _fitting(pools: PoolSettings, ranks: int) -> str:
    """What so many ranks are enough for."""
    width = ranks // pools.total
    if not width:
        return f"fewer than {pools.total} workers"
    return f"{pools.total} worker{'s' if pools.total > 1 else ''} of at most {width} rank{'s' if width > 1 else ''}"
