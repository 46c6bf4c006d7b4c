"""Timing headers on request only, in the words of the contract, with what has been reached so far."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

import pytest
from fakes.observed_cluster import ALWAYS_SPLIT, DECODE, MIXED, PREFILL, ObservedCluster

from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.stopwatch import Stopwatch, stage_times
from penstock.cluster.metrics import Metrics
from penstock.router.trail import AttemptTrail, Trail

ASK = {"x-penstock-timings": "1"}
MS = re.compile(r"\d+\.\d\d\Z")


@dataclass
class Followed:
    trail: Trail = field(default_factory=Trail)
    cached_tokens: int = 0


def figures(watch: Stopwatch) -> dict[str, str]:
    return {name.decode().removeprefix("x-penstock-"): value.decode() for name, value in watch.headers()}


def test_nothing_is_said_unasked() -> None:
    watch = Stopwatch(Metrics())
    watch.opened("id", "", timings=False)
    assert watch.headers() == []
    assert watch.comment() == b""


def test_the_choice_that_answered_first_is_told_of() -> None:
    watch = Stopwatch(Metrics())
    watch.opened(timings=True)
    slow, fast = Followed(cached_tokens=16), Followed(cached_tokens=32)
    slow.trail.times.update(admitted=0.5, prefill_sent=0.6, started=0.7, first_token=5.0)
    fast.trail.times.update(admitted=0.010, prefill_sent=0.015, started=0.018, first_token=0.030, handed_over=0.034)
    for followed, worker in ((slow, "p-0"), (fast, "p-1")):
        followed.trail.begin(AttemptTrail(1, worker, "d-0", "split", 0.0))
        watch.submitted(followed)  # type: ignore[arg-type]
    found = figures(watch)
    assert found["queue-ms"] == "13.00"  # at the gate and at the worker
    assert found["route-ms"] == "5.00"
    assert found["prefill-ms"] == "12.00"
    assert found["transfer-ms"] == "4.00"
    assert found["workers"] == "p-0,d-0,p-1"
    assert (found["cached-tokens"], found["attempts"]) == ("48", "1")
    assert "first-token-ms" not in found
    watch.piece(Piece(0, "x", (1,), None, None))
    assert MS.match(figures(watch)["first-token-ms"])
    comment = watch.comment().decode()
    assert comment.startswith(": x-penstock-timings queue-ms=13.00 ")
    assert comment.endswith("\n\n")
    assert comment.count("\n") == 2


@pytest.mark.parametrize(
    ("times", "stages"),
    [
        ({}, {}),
        ({"admitted": 1.0}, {"queue-ms": 1.0}),
        ({"admitted": 1.0, "prefill_sent": 3.0}, {"queue-ms": 1.0, "route-ms": 2.0}),
        (
            {"admitted": 1.0, "prefill_sent": 3.0, "first_token": 7.0},
            {"queue-ms": 1.0, "route-ms": 2.0, "prefill-ms": 4.0},
        ),
    ],
)
def test_stages_that_were_not_reached_are_absent(times: dict[str, float], stages: dict[str, float]) -> None:
    assert stage_times(Trail(times=times)) == stages


@pytest.mark.timeout(60)
def test_headers_over_a_split_cluster() -> None:
    async def run() -> None:
        async with ObservedCluster([PREFILL, DECODE], router=ALWAYS_SPLIT) as observed:
            # Long enough that the first token, which comes by the prefill worker, is not the last one to be read.
            whole = await observed.complete(range(1, 300), ASK, max_tokens=200)
            plain = await observed.complete(range(1, 300))
            streamed = await observed.complete(range(301, 600), ASK, stream=True, n=2, max_tokens=200)
        assert not [name for name in plain.headers if name.startswith("x-penstock-") and name.endswith("-ms")]
        for answer in (whole, streamed):
            stated = {name.removeprefix("x-penstock-"): value for name, value in answer.headers.items()}
            for stage in ("queue-ms", "route-ms", "prefill-ms", "first-token-ms", "total-ms"):
                assert MS.match(stated[stage]), stage
            stages = sum(float(stated[stage]) for stage in ("queue-ms", "route-ms", "prefill-ms"))
            assert stages <= float(stated["first-token-ms"]) + 0.1
            assert set(stated["workers"].split(",")) == {"prefill-0", "decode-1"}
        assert MS.match(whole.headers["x-penstock-transfer-ms"])
        comments = [line for line in streamed.text.splitlines() if line.startswith(": x-penstock-timings ")]
        assert len(comments) == 1
        told = dict(pair.split("=") for pair in comments[0].split()[2:])
        assert float(told["total-ms"]) >= float(streamed.headers["x-penstock-total-ms"])
        assert "transfer-ms" in told
        assert streamed.text.rstrip().endswith("data: [DONE]")

    asyncio.run(run())


@pytest.mark.timeout(60)
def test_headers_over_a_mixed_worker() -> None:
    async def run() -> None:
        async with ObservedCluster([MIXED]) as observed:
            answer = await observed.complete(range(1, 300), ASK)
        assert answer.headers["x-penstock-workers"] == "mixed-0"
        assert "x-penstock-transfer-ms" not in answer.headers

    asyncio.run(run())
