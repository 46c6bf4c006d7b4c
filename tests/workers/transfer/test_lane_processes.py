"""Lanes between processes, over Gloo: widths, and a sender that is killed or stopped in the middle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakes.fault_plan import ALWAYS, Action, Fault, FaultPlan
from fakes.lane_worker import LaneWorker
from fakes.transfer_pair import EPOCH

from penstock.workers.fault_points import Point
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import Arrived, Incoming, IncomingFailed, Tail

TESTS = Path(__file__).parents[2]
KEY = "5a" * 32
TOTAL, PIECES, BLOCK_BYTES = 2, 4, 1 << 19  # of the whole model; a frame of the sender's holds two blocks
SOURCES, TARGETS = (5, 1, 7, 2, 0, 6, 3, 4), (2, 3, 4, 5, 6, 7, 0, 1)


def slowly(seconds: float) -> Fault:
    return Fault(Point.TRANSFER_SEND, Action.DELAY, seconds=seconds, times=ALWAYS)


@contextlib.contextmanager
def transfer(source: int, target: int, *faults: Fault, lease_s: float = 10.0):
    """(receiving ranks, sending processes) of one session under way; none of them is left afterwards."""
    ranks = [HeadShare(TOTAL, target, rank) for rank in range(target)]
    workers = [
        LaneWorker(
            f"d{share.rank}",
            TransferSettings(transport="nccl", lease_s=lease_s),
            len(TARGETS),
            BLOCK_BYTES * share.heads.count // TOTAL,
            share=share,
            pieces=PIECES,
        )
        for share in ranks
    ]
    command = [sys.executable, "-m", "fakes.lane_worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    senders = [subprocess.Popen(command, text=True, cwd=TESTS, **pipes) for _ in range(source)]
    try:
        for sender in senders:  # imports take longer than leases here
            assert sender.stdout.readline() == "ready\n"
        session, generations = os.urandom(16), (0,) * len(TARGETS)
        for worker in workers:
            worker.engine.expect(Incoming(session, EPOCH, TARGETS, generations, lease_s))
        first, *others = [worker.engine.address for worker in workers]
        grant = Grant(session, "d", EPOCH, first, "", 0, TARGETS, generations, lease_s, "same", tuple(others))
        for rank, sender in enumerate(senders):
            share = HeadShare(TOTAL, source, rank)
            order = {
                "grant": {**dataclasses.asdict(grant), "session_id": session.hex()},
                "name": f"p{rank}",
                "sources": SOURCES,
                "block_bytes": BLOCK_BYTES * share.heads.count // TOTAL,
                "key": KEY,
                "plan": FaultPlan(faults).to_line(),
                "share": (TOTAL, source, rank),
                "pieces": PIECES,
                "lease_s": lease_s,
            }
            sender.stdin.write(json.dumps(order) + "\n")
            sender.stdin.flush()
        yield workers, senders
    finally:
        for sender in senders:
            sender.kill()
            sender.wait(10)
            sender.stdin.close()
            sender.stdout.close()
            sender.stderr.close()
        for worker in workers:
            worker.close()


def sent_by(share: HeadShare) -> torch.Tensor:
    """What the process of this rank has in its pool: [block, piece, head, byte]."""
    shape = (max(SOURCES) + 2, BLOCK_BYTES * share.heads.count // TOTAL)
    numbers = torch.arange(shape[0] * shape[1]).view(shape)
    content = ((numbers * 31 + (numbers >> 8) + 97 * share.rank) % 251).to(torch.uint8)
    return content.view(shape[0], PIECES, share.heads.count, -1)


@pytest.mark.parametrize(
    ("source", "target"), [(1, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (2, 1)))]
)
def test_every_rank_gets_its_heads(source: int, target: int) -> None:
    with transfer(source, target) as (workers, senders):
        for worker in workers:
            (event,) = worker.wait(1, 60.0)
            assert isinstance(event, Arrived)
            assert event.tail == Tail((1, 2))
        for sender in senders:
            said, complaints = sender.communicate(timeout=30)
            assert said.split() == ["offered", "OutgoingDone"], complaints
            assert sender.returncode == 0, complaints
        model = torch.cat([sent_by(HeadShare(TOTAL, source, rank)) for rank in range(source)], dim=2)
        for rank, worker in enumerate(workers):
            heads = HeadShare(TOTAL, target, rank).heads
            found = worker.pool.tensor[list(TARGETS)].view(len(TARGETS), PIECES, heads.count, -1)
            assert torch.equal(found, model[list(SOURCES), :, heads.first : heads.end])


def test_a_sender_killed_in_the_middle() -> None:
    with transfer(1, 1, slowly(0.2), Fault(Point.TRANSFER_SENT, Action.KILL, after=4)) as ((worker,), (sender,)):
        (event,) = worker.wait(1, 60.0)
        assert isinstance(event, IncomingFailed)
        assert event.reason.startswith("sender lost")
        assert sender.wait(10) == -signal.SIGKILL
        assert 0 < worker.engine.stats().fragments_landed <= 4
        before = time.monotonic()
        worker.engine.stop()  # whatever its lane still waits for
        assert time.monotonic() - before < 5.0


def test_a_sender_that_stands_still_loses_its_lease_and_writes_nothing_afterwards() -> None:
    with transfer(1, 1, slowly(0.4), lease_s=1.0) as ((worker,), (sender,)):
        until = time.monotonic() + 60.0
        while not worker.engine.stats().fragments_landed:
            assert time.monotonic() < until
            time.sleep(0.01)
        sender.send_signal(signal.SIGSTOP)
        (event,) = worker.wait(1, 10.0)
        assert isinstance(event, IncomingFailed)
        worker.pool.generations[:] += 1  # the blocks are another's from here on
        worker.pool.tensor[:-1] = 7
        sender.send_signal(signal.SIGCONT)
        said, complaints = sender.communicate(timeout=30)
        assert said.split() == ["offered", "OutgoingFailed"], complaints
        assert (worker.pool.tensor[:-1] == 7).all()
