"""What the HTTP application is told: the small piece of the configuration, and of the model, that it needs.

Built once by whoever starts the application (`ingress_settings`), then read only, but for the list of adapters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from penstock.cluster.adapter_rules import adapter_places
from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.key_file import KeyEntry, read_key_file
from penstock.cluster.model_directory import GenerationDefaults, ModelDescription
from penstock.cluster.settings import ClusterConfig, LimitSettings
from penstock.workers.adapter_ref import AdapterRef

CODEC = "plain"  # how KV is stored in blocks; quantised codecs get their own prefix roots


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """Values of one ingress process."""

    model_names: tuple[str, ...]
    max_model_len: int
    block_size: int = 16
    prefix_caching: bool = True
    revision: str = ""
    root: str = ""  # `root` of /v1/models: the model directory's name, never its path
    api_key: str = field(default="", repr=False)
    keys: tuple[KeyEntry, ...] = field(default=(), repr=False)
    limits_share: float = 1.0  # this process's part of the keys' limits: 1 / number of ingresses
    enable_tokenizer_info: bool = False
    operators_apart: bool = False  # what operators ask for is on a listener of its own
    auto_tool_choice: bool = True
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    limits: LimitSettings = field(default_factory=LimitSettings)
    adapters: Adapters = field(default_factory=Adapters, repr=False, compare=False)  # the one part that changes

    def prefix_root(self, tenant: str, cache_salt: str, adapter: AdapterRef | None = None) -> bytes:
        """Seed of a prompt's digest chain: equal KV content if and only if equal parts. 32 bytes."""
        parts = [tenant, cache_salt, self.revision, CODEC]
        if adapter is not None:
            parts.append(adapter.revision.hex())
        return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).digest()


def ingress_settings(config: ClusterConfig, model: ModelDescription) -> IngressSettings:
    """The application's piece of a cluster's configuration. Raises ConfigError for a bad file of keys."""
    front, names = config.front, config.front.served_model_name or (model.name,)
    places = adapter_places(model) if config.adapters.directory else {}
    return IngressSettings(
        model_names=names,
        max_model_len=config.scheduler.max_model_len,
        block_size=config.kv.block_size,
        prefix_caching=config.kv.prefix_caching,
        revision=model.revision,
        root=model.name,
        api_key=front.api_key,
        keys=read_key_file(Path(front.api_keys_file)) if front.api_keys_file else (),
        limits_share=1 / config.ray.ingress_replicas,
        enable_tokenizer_info=front.enable_tokenizer_info,
        operators_apart=front.admin == "apart",
        auto_tool_choice=front.enable_auto_tool_choice,
        defaults=model.defaults if config.front.generation_config == "auto" else GenerationDefaults(),
        limits=config.limits,
        adapters=Adapters(config.adapters, places, names),
    )
