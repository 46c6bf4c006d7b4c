"""Whether low-rank adapters can be served as a configuration asks: beside this model, by these workers, under these
names.

`derived.py` asks, once the model is known. Reads no adapter: a faulty one is no reason not to start, and is told by the
ingress that leaves it out. Needs neither torch nor Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from penstock.cluster.model_directory import ModelDescription
from penstock.cluster.settings import ClusterConfig, wrong
from penstock.workers.adapter_ref import ADAPTER_NAME
from penstock.workers.errors import AdapterError, ConfigError
from penstock.workers.lora.adapter_files import check_folder
from penstock.workers.lora.projections import Place, Size, adaptable
from penstock.workers.model.config import DecoderConfig


def check_adapters(config: ClusterConfig, model: ModelDescription) -> None:
    """Raises ConfigError naming the key; without a directory there are no adapters to be checked."""
    try:
        config.adapters.check()
    except ConfigError as error:
        raise wrong(config, str(error.key), str(error)) from error
    if not config.adapters.directory:
        return
    _directory(config)
    try:
        adapter_places(model)
    except ConfigError as error:
        raise wrong(config, "adapters.directory", str(error)) from error
    pools = config.pools
    if max(pools.expert_parallel_size, pools.context_parallel_size) > 1:
        reason = "adapters are not served by expert or context ranks: set both parallel sizes to 1"
        raise wrong(config, "adapters.directory", reason)
    _modules(config)


def adapter_places(model: ModelDescription) -> Mapping[Place, Size]:
    """What adapters of this model may change. Raises ConfigError for a model that is served without any."""
    if model.architecture is None:
        raise ConfigError("the oracle has no weights, and so no adapters")
    if not isinstance(model.architecture, DecoderConfig):
        raise ConfigError("adapters are served with our own decoders only, and this model runs in transformers")
    return adaptable(model.architecture)


def _directory(config: ClusterConfig) -> None:
    directory = config.adapters.directory
    if not os.path.isdir(directory):
        raise wrong(config, "adapters.directory", f"{directory}: no such directory")


def _modules(config: ClusterConfig) -> None:
    for name, folder in config.adapters.modules.items():
        if not ADAPTER_NAME.match(name):
            reason = f"{name!r:.140}: a name is 1 to 128 letters, digits, '.', '_' and '-'"
            raise wrong(config, "adapters.modules", reason)
        if name in config.front.served_model_name:
            raise wrong(config, "adapters.modules", f"{name!r} is the name of the model itself")
        try:
            check_folder(folder)
        except AdapterError as error:
            raise wrong(config, "adapters.modules", f"{name}: {folder!r:.200}: {error}") from error
