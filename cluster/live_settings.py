"""What a running deployment may change without new ingress replicas: pool sizes, from Serve's `user_config`.

`ingress_replica.py` reads it, `serve_app.py` writes the default. Knows nothing of Serve or workers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from penstock.cluster.coercion import coerce
from penstock.cluster.config import unknown_key
from penstock.cluster.settings import ClusterConfig, PoolSettings
from penstock.cluster.validation import pools_problem
from penstock.workers.errors import ConfigError

LIVE_KEYS = ("pools.prefill", "pools.decode", "pools.mixed")
SOURCE = "user_config"


def user_config_of(config: ClusterConfig) -> dict[str, dict[str, int]]:
    """The `user_config` that states what `config` holds."""
    pools = config.pools
    return {"pools": {"prefill": pools.prefill, "decode": pools.decode, "mixed": pools.mixed}}


def live_pools(config: ClusterConfig, user_config: Any) -> PoolSettings:
    """The pools of `config` with the sizes that `user_config` states. Raises ConfigError naming the key."""
    if not isinstance(user_config, dict):
        raise ConfigError(f"{SOURCE}: expected keys and values, not {user_config!r}", SOURCE)
    stated: dict[str, int] = {}
    for name, value in user_config.items():
        nested = value if name == "pools" and isinstance(value, dict) else {str(name).removeprefix("pools."): value}
        for role, count in nested.items():
            key = f"pools.{role}"
            if key not in LIVE_KEYS:
                raise unknown_key(key if name == "pools" else str(name), LIVE_KEYS, SOURCE)
            stated[role] = coerce(count, int, key, SOURCE)
    pools = dataclasses.replace(config.pools, **stated)
    problem = pools_problem(pools)
    if problem is not None:
        raise ConfigError(f"{SOURCE}: {problem[0]}: {problem[1]}", problem[0])
    return pools
