"""What ranks must be told alike, and how a difference is named."""

import dataclasses

from penstock.workers.parallel.shared_settings import differences, shared_settings
from penstock.workers.settings import GroupSettings, KVSettings, RunnerSettings, TransferSettings, WorkerSettings

BASE = WorkerSettings("w", cluster_key="ab" * 32, group=GroupSettings(tensor_parallel_size=4))


def told(**changed: object) -> str:
    return shared_settings(dataclasses.replace(BASE, **changed))  # type: ignore[arg-type]


def test_the_key_stays_at_home() -> None:
    assert "abab" not in told()


def test_ranks_may_differ_in_place() -> None:
    other = told(
        host="10.0.0.2",
        port=5,
        parent_pid=3,
        group=GroupSettings(tensor_parallel_size=4, rank=3, leader="a:1", host="10.0.0.2"),
        runner=RunnerSettings(device="cuda:3", cpus=(3,), record_dir="/r3"),
        transfer=TransferSettings(host="10.0.0.2"),
    )
    assert differences(told(runner=RunnerSettings(device="cuda:0")), other) == []


def test_differences_are_named_with_both_values() -> None:
    assert differences(told(), told(kv=KVSettings(num_blocks=7))) == ["kv.num_blocks is 7 instead of 0"]
    assert differences(told(), told(worker_id="v", incarnation=2)) == [
        "incarnation is 2 instead of 1",
        "worker_id is 'v' instead of 'w'",
    ]
    assert differences(told(), "no json")
    assert len(differences(told(), "{}")) == 4
