"""The configuration of a whole cluster as one tree of frozen values; its keys are dotted names like `kv.block_size`.

`config.py` fills it from a file, the environment, flags and Python; `launch.py`, the ingress and the controller read
it. The sections that workers and routers need are those rooms' own settings, so each key exists once. Knows nothing
of where a value came from beyond the text in `sources`.

    runner     what computes: model directory, dtype, threads        (workers)
    scheduler  limits of one step and of the waiting queue           (workers)
    kv         the block pool                                        (workers)
    transfer   KV blocks between workers                             (workers)
    health     heartbeats and leases                                 (workers)
    pools      how many workers of which role
    router     placement and admission                               (router)
    front      address, names, key
    limits     what one HTTP request may ask for
    ray        where the cluster runs
    tracing    where spans go                                        (every process)
    logs       format, level, access log                             (every process)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.router.settings import RouterSettings
from penstock.workers.protocol import Role
from penstock.workers.settings import (
    KVSettings,
    LogSettings,
    RunnerSettings,
    SchedulerSettings,
    TracingSettings,
    TransferSettings,
)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Workers by role."""

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    tensor_parallel_size: int = 1

    @property
    def total(self) -> int:
        """Workers of all roles."""
        return self.prefill + self.decode + self.mixed

    def count(self, role: Role) -> int:
        """Workers of one role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role]


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Heartbeats, leases, and the way out."""

    heartbeat_s: float = 0.5
    router_lease_s: float = 10.0
    drain_s: float = 30.0  # longest wait of a stopping worker for what it runs


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The HTTP server."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 0  # the same API by gRPC, on the same host; 0 = off
    served_model_name: tuple[str, ...] = ()  # empty = the model directory's name; the first is the one reported
    api_key: str = field(default="", repr=False)  # empty = no key asked
    api_keys_file: str = ""  # YAML list of keys with their limits; see `key_file.py`
    enable_tokenizer_info: bool = False  # GET /tokenizer_info, which tells the chat template
    skip_tokenizer_init: bool = False  # token ids in, token ids out
    metrics_aliases: str = "vllm"  # vllm: its metric names beside ours on /metrics; none: ours only
    generation_config: str = "auto"  # auto: defaults from generation_config.json; vllm or none: no such defaults


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Bounds of one HTTP request, checked before anything is tokenised or allocated."""

    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 200
    max_prompts: int = 128  # prompts in one completions request
    max_choices: int = 128  # prompts x n
    max_messages: int = 4096
    max_stop_strings: int = 16
    max_stop_bytes: int = 1024  # of one stop string
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024  # entries
    max_bad_words: int = 256
    max_allowed_token_ids: int = 65536
    max_prompt_logprobs: int = 1 << 18  # prompt tokens x (1 + alternatives) scored in one request
    max_tokenize_bytes: int = 1 << 20  # of text for /tokenize
    max_logprobs: int = 20
    max_label_bytes: int = 4096  # user, metadata, cache_salt and the like
    max_open_requests: int = 1024  # being served at once by one ingress
    body_timeout_s: float = 30.0  # for the whole body to arrive
    write_timeout_s: float = 30.0  # a reader that takes nothing for so long is cut off


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where the cluster runs and what its parts ask Ray for."""

    address: str = ""  # empty = start a local cluster
    cluster_name: str = ""  # under which clients find the cluster; empty = the Serve application's name
    worker_num_cpus: float = 0.25
    worker_num_gpus: float = 0.0
    worker_accelerator_type: str = ""  # as Ray names it: "H100", "L4"; empty = any
    worker_label_selector: Mapping[str, str] = field(default_factory=dict)  # labels of the nodes that may host workers
    worker_host: str = ""  # what workers bind and tell; empty = loopback on our own head, else the node's address
    prefill_resources: Mapping[str, float] = field(default_factory=dict)  # custom resources of one prefill worker
    decode_resources: Mapping[str, float] = field(default_factory=dict)
    mixed_resources: Mapping[str, float] = field(default_factory=dict)
    ingress_num_cpus: float = 0.1
    ingress_replicas: int = 1
    max_ingress_per_node: int = 0  # 0 = any number


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything one cluster is started from. `sources` maps a dotted key to where its value came from."""

    runner: RunnerSettings = field(default_factory=RunnerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    pools: PoolSettings = field(default_factory=PoolSettings)
    front: FrontSettings = field(default_factory=FrontSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def model_name(self) -> str:
        """The name answers carry when the caller's own is not one of the others."""
        return self.front.served_model_name[0] if self.front.served_model_name else "penstock"


def with_value(tree: Any, key: str, value: object) -> Any:
    """A copy of `tree` with the value under one dotted key exchanged."""
    name, _, rest = key.partition(".")
    return replace(tree, **{name: with_value(getattr(tree, name), rest, value) if rest else value})


def value_of(tree: Any, key: str) -> Any:
    """The value under a dotted key."""
    name, _, rest = key.partition(".")
    return value_of(getattr(tree, name), rest) if rest else getattr(tree, name)
