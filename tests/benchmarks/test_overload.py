"""A short edition of `overload.py`: who is admitted is served in time, the rest hears at once, all is well again."""

from __future__ import annotations

import asyncio
import statistics

import pytest
from benchmarks.overload import TPOT_FACTOR, Source, summary
from benchmarks.overload_ingress import OverloadedCluster, Shape

SHAPE = Shape(step_s=0.05, max_num_seqs=8, prompt_tokens=60, output_tokens=24, tpot_target_s=0.08)
PLACES, ANSWER_S = 16, 24 * 0.051
SECONDS = 4.0


@pytest.mark.timeout(90)
def test_three_times_the_capacity_and_a_flood_beside_a_modest_tenant() -> None:
    async def scenario(cluster: OverloadedCluster) -> None:
        source = Source(cluster.url, SHAPE)
        alone = [(await source.one()).outcome for _ in range(2)]
        tpot_target_s = TPOT_FACTOR * statistics.median(outcome.tpot_s for outcome in alone)
        capacity = PLACES / ANSWER_S
        flood, fair = Source(cluster.url, SHAPE, "flood"), Source(cluster.url, SHAPE, "fair")
        flooding, modest = await asyncio.gather(
            flood.open_loop(2.75 * capacity, SECONDS), fair.open_loop(0.25 * capacity, SECONDS)
        )
        flooded, served = summary(flooding, tpot_target_s), summary(modest, tpot_target_s)
        after = await source.one()
        assert flooded["failed"] == served["failed"] == [], (flooded, served)
        assert flooded["refused"] > flooded["requests"] / 3, "that was no overload"
        assert flooded["both_kept"] >= 0.9, flooded
        assert flooded["refused_within_1_s"] >= 0.95, flooded
        assert (served["refused"], served["both_kept"] >= 0.95) == (0, True), served
        assert after.outcome.ttft_s < 1.0, "the burst is over"

    with OverloadedCluster(SHAPE) as cluster:
        asyncio.run(scenario(cluster))
