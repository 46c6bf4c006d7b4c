"""Every rank of a group gets its part of an adapter over the channel of steps, and nothing that does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.adapters import make_adapter

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.errors import ConfigError, WireError
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.bank import AdapterBank
from penstock.workers.lora.projections import adaptable
from penstock.workers.lora.weights import HostAdapter, host_adapter
from penstock.workers.model.config import DecoderConfig, read_config
from penstock.workers.parallel.group_adapters import GroupAdapters, put_update
from penstock.workers.parallel.group_messages import GroupMessage, PutUpdate, decode_message, encode_message
from penstock.workers.parallel.shards import TensorShard

CONFIG = read_config(EMBEDDED_MODEL)
PLACES = adaptable(CONFIG)
CPU = torch.device("cpu")


def bank(rank: int = 0, width: int = 2, config: DecoderConfig = CONFIG, max_rank: int = 4) -> AdapterBank:
    return AdapterBank(config, 2, max_rank, torch.float32, CPU, TensorShard(rank, width))


def adapter(home: Path) -> HostAdapter:
    make_adapter(home / "a", rank=3, modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    return host_adapter(read_adapter(home, "a", PLACES, 4))


def test_the_parts_of_all_ranks_are_the_whole(tmp_path: Path) -> None:
    ranks = [bank(0), bank(1)]
    whole = bank(0, 1)
    loaded = adapter(tmp_path)

    def send(message: GroupMessage) -> None:
        arrived = decode_message(encode_message(message))
        assert isinstance(arrived, PutUpdate)
        put_update(ranks[1], arrived)

    GroupAdapters(ranks[0], send).put(1, loaded)
    whole.put(1, loaded)
    x = {
        name: torch.randn(5, PLACES[0, name].inputs, dtype=torch.float64) for name in ("q_proj", "o_proj", "down_proj")
    }
    for layer in range(CONFIG.num_layers):
        for name, inputs in x.items():
            room = whole._rooms[layer, name]
            wanted = inputs @ room.a[1].double().T @ room.b[1].double().T
            parts = []
            for rank in ranks:
                own, (columns, _) = rank._rooms[layer, name], rank._parts[name]
                mine = inputs[:, columns.start : columns.stop]
                parts.append(mine @ own.a[1].double().T @ own.b[1].double().T)
            found = torch.cat(parts, 1) if name == "q_proj" else parts[0] + parts[1]
            assert torch.allclose(found, wanted, atol=1e-12)
            assert wanted.abs().max() > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"place": 2},
        {"layer": 99},
        {"projection": "lm_head"},
        {"rank": 5},
        {"rank": 2},
        {"a": np.zeros(3, np.uint8)},
        {"b": np.zeros(0, np.uint8)},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    sent: list[GroupMessage] = []
    GroupAdapters(bank(0), sent.append).put(0, adapter(tmp_path))
    message = next(each for each in sent if isinstance(each, PutUpdate) and each.rank)
    put_update(bank(1), message)
    with pytest.raises(WireError, match="PutUpdate"):
        put_update(bank(1), replace(message, **changed))
    with pytest.raises(WireError, match="PutUpdate"):
        put_update(None, message)


def test_an_update_that_no_message_could_hold_is_refused_at_start() -> None:
    wide = replace(CONFIG, hidden_size=1 << 17, num_layers=1)
    with pytest.raises(ConfigError, match="at most") as error:
        GroupAdapters(bank(0, 2, wide, 256), print)
    assert error.value.key == "adapters.max_rank"
