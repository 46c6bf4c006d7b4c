"""Who is blamed when a worker of several ranks does not start, or ends."""

from __future__ import annotations

import asyncio

import pytest

from penstock.cluster import group_ranks
from penstock.cluster.group_ranks import Failure, end_in_words, heard_from, rank_settings, reason_of, start_timeout_s
from penstock.workers.settings import GroupSettings, WorkerSettings

GROUP = WorkerSettings("w", group=GroupSettings(tensor_parallel_size=3, start_timeout_s=7.0))


def test_ranks_differ_in_their_number_and_where_to_join() -> None:
    told = rank_settings(GROUP, 2, "h:1")
    assert (told.group.rank, told.group.leader, told.title) == (2, "h:1", "w/2")
    assert rank_settings(told, 0) == GROUP
    assert WorkerSettings("w").title == "w"
    assert (start_timeout_s(GROUP, 600.0), start_timeout_s(WorkerSettings("w"), 600.0)) == (17.0, 600.0)


@pytest.mark.parametrize(
    ("failures", "width", "words"),
    [
        ([Failure(0, "bad", "ConfigError")], 1, "bad"),
        ([Failure(0, "the group ends", "GroupError"), Failure(1, "no file", "ModelError")], 2, "rank 1: no file"),
        ([Failure(0, "rank 1: no file", "ConfigError"), Failure(1, "no file", "ModelError")], 2, "rank 1: no file"),
        ([Failure(0, "gone", "GroupError"), Failure(2, "ended by SIGKILL")], 3, "rank 2: ended by SIGKILL"),
        ([Failure(1, "rank 0 is gone", "GroupError")], 2, "rank 0 is gone"),
    ],
)  # fmt: skip
def test_the_rank_at_fault_is_the_one_that_has_a_reason_of_its_own(
    failures: list[Failure], width: int, words: str
) -> None:
    assert reason_of(failures, width) == words


@pytest.mark.parametrize(
    ("ends", "blameless", "words"),
    [
        (["exited with status 3"], [False], "exited with status 3"),
        (["5", "ended by SIGKILL", "5"], [True, False, True], "rank 1 ended by SIGKILL; 2 more followed"),
        (["0", "0"], [True, True], "all 2 ranks ended: 0"),
        (["a", "b"], [False, False], "rank 0 a; rank 1 b"),
    ],
)
def test_ends_in_words(ends: list[str], blameless: list[bool], words: str) -> None:
    assert end_in_words(ends, blameless) == words


def test_a_start_waits_for_all_but_not_beside_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_ranks, "WORDS_S", 0.1)

    async def says(after_s: float, **words: object) -> dict[str, object]:
        await asyncio.sleep(after_s)
        return words

    async def scenario() -> None:
        ready = [says(0.05, address="h:1"), says(0.0, joined=True), says(0.02, joined=True)]
        heard = await heard_from([asyncio.ensure_future(one) for one in ready])
        assert heard == {0: {"address": "h:1"}, 1: {"joined": True}, 2: {"joined": True}}
        one_fails = [says(60.0), says(0.05, message="why"), says(0.1, message="it went"), says(0.0, joined=True)]
        heard = await asyncio.wait_for(heard_from([asyncio.ensure_future(one) for one in one_fails]), 5.0)
        assert heard == {1: {"message": "why"}, 2: {"message": "it went"}, 3: {"joined": True}}

    asyncio.run(scenario())
