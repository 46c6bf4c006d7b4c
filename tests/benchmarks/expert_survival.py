"""A live worker of four ranks that share experts: the stall when one is killed or stopped, and the skew of their load.

Run from the repository's root: `python tests/benchmarks/expert_survival.py`. Every rank is a process, requests go over
the data plane. Layers of experts are paced by sleep, 4 ms each, so that two cores hold four ranks. Prints one JSON
object; exits 1 where a bar is missed, a request failed or a token is wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance
from fakes.expert_worker import Answers, Streams, expert_checkpoint, expert_request, expert_worker, undisturbed
from fakes.oracle_cluster import leaked_blocks

from penstock.cluster.local import LocalCluster
from penstock.cluster.subprocess_host import SubprocessHost
from penstock.workers.protocol import GenerateRequest, Tokens
from penstock.workers.settings import WorkerSettings

MOST_STALL_S, MOST_SKEW, RANKS = 1.0, 1.2, 4
LEVEL_STEPS = 60
PACED = (sys.executable, str(Path(__file__).parents[1] / "fakes" / "paced_rank.py"), "0.004")


def paced_cluster(worker: WorkerSettings, log: Path) -> LocalCluster:
    return LocalCluster([worker], host=SubprocessHost(log, PACED), restart=False)


async def disturbed(worker: WorkerSettings, requests: Sequence[GenerateRequest], number: int, log: Path) -> Answers:
    """One rank gets the signal after a third of the tokens."""
    async with paced_cluster(worker, log) as cluster:
        streams = Streams(cluster, requests)
        await streams.until_tokens(sum(request.sampling.max_tokens for request in requests) // 3, 60)
        cluster.process(worker.worker_id).signal(number, 2)
        answers = await streams.ended(120)
        assert await leaked_blocks(cluster) == 0
        assert cluster.fleet.workers()[0].ranks_lost == 1
    return answers


def survived(folder: Path, number: int, most_stall_s: float) -> dict[str, object]:
    """Two copies of every expert, one rank of four lost: every stream goes on, with the very tokens."""
    model_dir = expert_checkpoint(folder / f"model-{number}")
    requests = [expert_request(each, 150) for each in range(40)]
    (wanted,) = asyncio.run(undisturbed(model_dir, [requests], folder / "log"))
    worker = expert_worker(model_dir, RANKS)
    answers = asyncio.run(disturbed(worker, requests, number, folder / "log"))
    wrong = sum(a != b for got, want in zip(answers.texts, wanted, strict=True) for a, b in zip(got, want, strict=True))
    return {
        "streams": len(requests),
        "tokens": answers.tokens,
        "failed": len(answers.failed),
        "stall_s": round(answers.longest_gap_s, 3),
        "wrong_tokens": wrong,
        "right": not answers.failed and not wrong and answers.longest_gap_s <= most_stall_s,
    }


async def watched(
    worker: WorkerSettings, requests: Sequence[GenerateRequest], log: Path
) -> tuple[list[Tokens], list[tuple[int, float]]]:
    """Texts, and (step, skew of the ranks' rows) as heartbeats said it."""
    said: list[tuple[int, float]] = []
    async with paced_cluster(worker, log) as cluster:
        streams = Streams(cluster, requests)
        ending = asyncio.ensure_future(streams.ended(180))
        while not ending.done():
            await asyncio.sleep(0.02)
            status = cluster.fleet.workers()[0]
            said.append((status.step, status.totals.expert_skew))
        assert (await ending).failed == []
    return streams.answers.texts, said


def levelled(folder: Path) -> dict[str, object]:
    """16 experts under a power-law router (1.2), 5 slots on each rank: skew before the first round, and at the end."""
    model_dir = expert_checkpoint(folder / "skewed", experts=16, favour=1.2)
    requests = [expert_request(each, 300, sampled=True) for each in range(60)]
    (wanted,) = asyncio.run(undisturbed(model_dir, [requests], folder / "log"))
    worker = expert_worker(model_dir, RANKS, redundant_experts=1, expert_rebalance_steps=LEVEL_STEPS)
    log = folder / "levelled-log"
    texts, said = asyncio.run(watched(dataclasses.replace(worker, heartbeat_s=0.05), requests, log))
    before = [skew for step, skew in said if 0 < step < LEVEL_STEPS][-1]
    after = said[-1][1]
    return {
        "steps": said[-1][0],
        "skew_before": round(before, 3),
        "skew_after": round(after, 3),
        "rounds_that_moved": log.read_text().count("experts move"),
        "texts_wrong": sum(got != want for got, want in zip(texts, wanted, strict=True)),
        "right": texts == wanted and after <= MOST_SKEW < before,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "killed": survived(folder, signal.SIGKILL, MOST_STALL_S),
            "stopped": survived(folder, signal.SIGSTOP, 2.0 + MOST_STALL_S),
            "levelled": levelled(folder),
        }
    print(json.dumps({"what": "experts over 4 ranks of a live worker", **provenance(), **found}, indent=2))
    return 0 if all(case["right"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
