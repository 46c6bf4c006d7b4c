"""An edition: all that workers of one configuration have in common, and a name for it that follows from its content.

The ingress and `launch.py` make one from their configuration; the controller keeps workers of one or, while a
deployment is being replaced, two editions. An ingress process links only to workers of its own edition, so requests
never mix models, KV layouts or limits. Pool sizes are no part of it: scaling keeps the edition.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.config import ClusterIdentity, worker_settings
from penstock.cluster.cores import Shares, share_of, shares_of
from penstock.cluster.settings import ClusterConfig, PoolSettings, group_settings
from penstock.workers.protocol import Role
from penstock.workers.settings import GroupSettings, WorkerSettings

KEY_CHARS = 16
# What a private head sets for everything below it, and a Ray cluster that runs already must be told per actor.
WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "30000",
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "ERROR",
}


@dataclass(frozen=True, slots=True)
class ActorNeeds:
    """What one worker actor asks Ray for: one rank, where a worker has several."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # custom ones, by role
    label_selector: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def options(self, role: Role) -> dict[str, Any]:
        """As keywords of Ray's `options`."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.resources.get(role.value):
            options["resources"] = dict(self.resources[role.value])
        if self.label_selector:
            options["label_selector"] = dict(self.label_selector)
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        if self.environment:
            options["runtime_env"] = {"env_vars": dict(self.environment)}
        return options

    def amounts(self, role: Role) -> dict[str, float]:
        """Resource name to amount, without zeros."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources.get(role.value, {})}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True, slots=True)
class Edition:
    """`settings` is WorkerSettings as JSON without identity and role; `key` names the whole, but for the cores."""

    key: str
    settings: str
    needs: ActorNeeds
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)  # by role; one rank where there is none
    shares: Shares = field(default_factory=dict)  # of the host's cores; follow from the pool sizes at start

    def worker(self, worker_id: str, role: Role, identity: ClusterIdentity, incarnation: int = 1) -> WorkerSettings:
        """The settings of one worker, or of rank 0 of it."""
        settings = WorkerSettings.from_json(self.settings)
        group = self.groups.get(role.value, GroupSettings())
        number = worker_id.rpartition("-")[2]
        cpus = share_of(self.shares, settings.runner.cpus, role, int(number) if number.isdecimal() else 0)
        return dataclasses.replace(
            settings,
            runner=dataclasses.replace(settings.runner, cpus=cpus),
            group=dataclasses.replace(group, host=settings.host),
            worker_id=worker_id,
            role=role,
            incarnation=incarnation,
            cluster_id=identity.cluster_id,
            cluster_key=identity.key,
        )

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Edition:
        """Inverse of `to_json`."""
        shares = {role: tuple(map(tuple, parts)) for role, parts in raw.get("shares", {}).items()}
        groups = {role: GroupSettings(**group) for role, group in raw.get("groups", {}).items()}
        return Edition(raw["key"], raw["settings"], ActorNeeds(**raw["needs"]), groups, shares)


def edition_of(config: ClusterConfig) -> Edition:
    """The edition that a configuration means."""
    settings = worker_settings(config, Role.MIXED, 0, ClusterIdentity("", ""))
    foreign = bool(config.ray.address)
    host = config.ray.worker_host or ("" if foreign else settings.host)  # empty: the actor asks Ray for its node's
    runner = dataclasses.replace(settings.runner, cpus=config.runner.cpus)
    settings = dataclasses.replace(settings, worker_id="", host=host, runner=runner, group=GroupSettings())
    if "transfer.host" not in config.sources:
        settings = dataclasses.replace(settings, transfer=dataclasses.replace(settings.transfer, host=host))
    needs = ActorNeeds(
        # On our own head threads, not Ray, divide the cores; there it must not stand in the way of more workers.
        num_cpus=config.ray.worker_num_cpus if foreign else 0.0,
        num_gpus=config.ray.worker_num_gpus,
        resources={
            Role.PREFILL.value: dict(config.ray.prefill_resources),
            Role.DECODE.value: dict(config.ray.decode_resources),
            Role.MIXED.value: dict(config.ray.mixed_resources),
        },
        label_selector=dict(config.ray.worker_label_selector),
        accelerator_type=config.ray.worker_accelerator_type,
        environment=dict(WORKER_ENVIRONMENT) if foreign else {},
    )
    groups = {role.value: group_settings(config, role) for role in Role}
    text = settings.to_json()
    told = {role: dataclasses.asdict(group) for role, group in groups.items()}
    content = json.dumps([json.loads(text), dataclasses.asdict(needs), told], sort_keys=True)
    return Edition(hashlib.sha256(content.encode()).hexdigest()[:KEY_CHARS], text, needs, groups, shares_of(config))


def counts_of(pools: PoolSettings) -> dict[Role, int]:
    """Workers by role."""
    return {role: pools.count(role) for role in Role}
