"""The configuration of a whole cluster as one tree of frozen values; its keys are dotted names like `kv.block_size`.

`config.py` fills it from a file, the environment, flags and Python; `launch.py`, the ingress and the controller read
it. The sections that workers and routers need are those rooms' own settings, so each key exists once. Knows nothing
of where a value came from beyond the text in `sources`.

    runner     what computes: model directory, dtype, threads        (workers)
    scheduler  limits of one step and of the waiting queue           (workers)
    kv         the block pool                                        (workers)
    transfer   KV blocks between workers                             (workers)
    weights    where a starting worker's weights come from           (workers)
    health     heartbeats and leases                                 (workers)
    pools      how many workers of which role, of how many ranks
    ranks      how the ranks of one worker share its work, and watch over each other
    router     placement and admission                               (router)
    front      address, names, key
    limits     what one HTTP request may ask for
    ray        where the cluster runs
    tracing    where spans go                                        (every process)
    logs       format, level, access log                             (every process)
    ledger     which requests are accounted for a second time        (ingress, workers)
    tls        certificates, for callers and between processes       (ingress, workers)
    adapters   low-rank adapters of the model                        (ingress, workers)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.router.settings import RouterSettings
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role
from penstock.workers.settings import (
    AdapterSettings,
    GroupSettings,
    KVSettings,
    LedgerSettings,
    LogSettings,
    RunnerSettings,
    SchedulerSettings,
    TlsSettings,
    TracingSettings,
    TransferSettings,
    WeightSettings,
)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Workers by role, and of how many ranks each is: those of a copy of the attention layers, times the copies."""

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    tensor_parallel_size: int = 1
    prefill_tensor_parallel_size: int = 0  # 0 = as tensor_parallel_size
    decode_tensor_parallel_size: int = 0  # 0 = as tensor_parallel_size
    expert_parallel_size: int = 1  # of every role: copies that share the experts
    context_parallel_size: int = 1  # of every role: copies that compute long prompts together

    @property
    def total(self) -> int:
        """Workers of all roles."""
        return self.prefill + self.decode + self.mixed

    @property
    def ranks(self) -> int:
        """Processes that compute: the ranks of all workers."""
        return sum(self.count(role) * self.width(role) for role in Role)

    @property
    def widest(self) -> int:
        """Ranks of the widest worker that there is."""
        return max((self.width(role) for role in Role if self.count(role)), default=1)

    def count(self, role: Role) -> int:
        """Workers of one role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role]

    def tensor_width(self, role: Role) -> int:
        """Ranks that share one copy of the layers of a worker of this role."""
        own = {Role.PREFILL: self.prefill_tensor_parallel_size, Role.DECODE: self.decode_tensor_parallel_size}
        return own.get(role, 0) or self.tensor_parallel_size

    def width(self, role: Role) -> int:
        """Ranks of one worker of this role."""
        return self.tensor_width(role) * max(self.expert_parallel_size, self.context_parallel_size)


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What holds for the ranks of every worker that has several; see `workers/settings.py:GroupSettings`."""

    context_parallel_threshold: int = 1024  # tokens of one prompt in one step from which on copies share it; 0 = never
    redundant_experts: int = 0  # slots of each rank and layer beyond those that hold every expert once
    expert_rebalance_steps: int = 256  # experts may move so often, in steps; 0 = only after a rank was lost
    lost_experts: str = "refuse"  # refuse | degrade: steps whose tokens chose an expert that went with its rank
    start_timeout_s: float = 300.0  # from the first rank's start until all have loaded
    heartbeat_s: float = 0.5
    silence_s: float = 2.0  # a rank that says nothing for so long ends the group
    slow_factor: float = 3.0  # so does one that takes so many times what a step should take


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Heartbeats, leases, and the way out."""

    heartbeat_s: float = 0.5
    router_lease_s: float = 10.0
    drain_s: float = 30.0  # longest wait of a stopping worker for what it runs
    worker_lease_s: float = 90.0  # workers live so long without their controller; longer than Ray waits for its head


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The HTTP server."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 0  # the same API by gRPC, on the same host; 0 = off
    admin: str = "apart"  # apart: /metrics and /status on a listener of their own; shared: beside the API
    admin_host: str = "127.0.0.1"  # of that listener
    admin_port: int = 0  # 0 = the port after `port`, or a free one where that is 0
    served_model_name: tuple[str, ...] = ()  # empty = the model directory's name; the first is the one reported
    api_key: str = field(default="", repr=False)  # empty = no key asked
    api_keys_file: str = ""  # YAML list of keys with their limits; see `key_file.py`
    enable_tokenizer_info: bool = False  # GET /tokenizer_info, which tells the chat template
    skip_tokenizer_init: bool = False  # token ids in, token ids out
    metrics_aliases: str = "vllm"  # vllm: its metric names beside ours on /metrics; none: ours only
    tool_call_parser: str = "auto"  # how the model writes tool calls; auto: as its chat template tells
    enable_auto_tool_choice: bool = True  # tool_choice "auto"; without it only calls that are asked for
    generation_config: str = "auto"  # auto: defaults from generation_config.json; vllm or none: no such defaults

    @property
    def operators_port(self) -> int:
        """Where /metrics and /status are asked for; 0 = any free port."""
        beside = self.admin_port or (self.port + 1 if self.port else 0)
        return self.port if self.admin == "shared" else beside


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Bounds of one HTTP request, checked before anything is tokenised or allocated."""

    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 200
    max_prompts: int = 128  # prompts in one completions request
    max_choices: int = 128  # prompts x n
    max_messages: int = 4096
    max_tools: int = 128
    max_tool_bytes: int = 256 << 10  # of all of them, as JSON
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
    # Custom resources of one rank of a prefill worker, and so on; processors and GPUs are of one rank too.
    prefill_resources: Mapping[str, float] = field(default_factory=dict)
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
    weights: WeightSettings = field(default_factory=WeightSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    pools: PoolSettings = field(default_factory=PoolSettings)
    ranks: RankSettings = field(default_factory=RankSettings)
    front: FrontSettings = field(default_factory=FrontSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scheme(self) -> str:
        """Of the URLs of its HTTP listeners."""
        return "https" if self.tls.cert_file else "http"

    @property
    def model_name(self) -> str:
        """The name answers carry when the caller's own is not one of the others."""
        return self.front.served_model_name[0] if self.front.served_model_name else "penstock"


def group_settings(config: ClusterConfig, role: Role) -> GroupSettings:
    """What the ranks of a worker of this role are told of their group; rank 0's, without an address."""
    pools, ranks = config.pools, config.ranks
    return GroupSettings(
        tensor_parallel_size=pools.tensor_width(role),
        expert_parallel_size=pools.expert_parallel_size,
        context_parallel_size=pools.context_parallel_size,
        context_parallel_threshold=ranks.context_parallel_threshold,
        redundant_experts=ranks.redundant_experts,
        expert_rebalance_steps=ranks.expert_rebalance_steps,
        lost_experts=ranks.lost_experts,
        start_timeout_s=ranks.start_timeout_s,
        heartbeat_s=ranks.heartbeat_s,
        silence_s=ranks.silence_s,
        slow_factor=ranks.slow_factor,
    )


def with_value(tree: Any, key: str, value: object) -> Any:
    """A copy of `tree` with the value under one dotted key exchanged."""
    name, _, rest = key.partition(".")
    return replace(tree, **{name: with_value(getattr(tree, name), rest, value) if rest else value})


def value_of(tree: Any, key: str) -> Any:
    """The value under a dotted key."""
    name, _, rest = key.partition(".")
    return value_of(getattr(tree, name), rest) if rest else getattr(tree, name)


def wrong(config: ClusterConfig, key: str, reason: str) -> ConfigError:
    """The error for one key; says where the value came from."""
    source = config.sources.get(key)
    return ConfigError(f"{key} (from {source}): {reason}" if source else f"{key}: {reason}", key=key)
