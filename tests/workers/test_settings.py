"""Groups that cannot be are refused with the key and the numbers, before any process is started."""

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.settings import GroupSettings, WorkerSettings


@pytest.mark.parametrize(
    ("group", "key"),
    [
        (GroupSettings(tensor_parallel_size=2, rank=2, leader="h:1"), "group.rank"),
        (GroupSettings(tensor_parallel_size=2, rank=1), "group.leader"),
        (GroupSettings(tensor_parallel_size=0), "group.tensor_parallel_size"),
        (GroupSettings(expert_parallel_size=-1), "group.expert_parallel_size"),
        (GroupSettings(tensor_parallel_size=2, silence_s=0.4), "group.silence_s"),
        (GroupSettings(tensor_parallel_size=2, slow_factor=1.0), "group.slow_factor"),
        (GroupSettings(tensor_parallel_size=2, start_timeout_s=0.0), "group.start_timeout_s"),
        (GroupSettings(tensor_parallel_size=2, heartbeat_s=float("nan")), "group.heartbeat_s"),
    ],
)
def test_impossible_groups_are_refused(group: GroupSettings, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        group.check()
    assert caught.value.key == key


def test_groups_travel_with_the_settings() -> None:
    group = GroupSettings(tensor_parallel_size=2, expert_parallel_size=2, rank=3, leader="h:1")
    group.check()
    assert group.width == 4
    assert WorkerSettings.from_json(WorkerSettings("w", group=group).to_json()).group == group
