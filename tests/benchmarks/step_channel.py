"""What a step plan costs on its way to another rank and back, beside what else could carry it.

    python tests/benchmarks/step_channel.py [--rounds 2000] [--no-ray] [--json FILE]

One follower process answers every plan with 8 bytes, as a rank of the oracle does. The plan is encoded, sent,
received, decoded on the other side, and answered. A pipe, a Ray actor call and a compiled Ray graph carry the bytes of
the same plan, already encoded, and are answered with 8 bytes. Times are medians of round trips; the means of the
quickest halves stand beside them. The ends of pipe and channel are bound to two cores, as ranks that compute are: two
ends on one core would be switched between without a core ever having to be woken. Ray has both cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance

from penstock.workers.memory_profile import largest_plan
from penstock.workers.parallel.meeting import Meeting, join
from penstock.workers.parallel.plan_codec import encode_plan
from penstock.workers.parallel.step_channel import StepReceiver, StepSender
from penstock.workers.scheduler.plan import StepPlan
from penstock.workers.settings import GroupSettings, WorkerSettings
from penstock.workers.step_inputs import StepLimits
from penstock.workers.transfer.host import host_id

SHAPES = {"16 rows": (16, 32), "256 rows": (256, 64)}  # rows that decode, blocks of the longest
ANSWER = b"12345678"


def plan_of(rows: int, blocks: int) -> StepPlan:
    """A step in which all rows decode, one of them with so many blocks."""
    plan = largest_plan(StepLimits(rows, rows, blocks), 16)
    tables = plan.block_tables.repeat(blocks, axis=1)[:, :blocks]
    return dataclasses.replace(plan, block_tables=tables, num_decode=rows)


def timed(trip: Callable[[], object], rounds: int) -> dict[str, float]:
    """Microseconds of one round trip."""
    for _ in range(rounds // 10 + 1):
        trip()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        trip()
        times.append(1e6 * (time.perf_counter() - began))
    times.sort()
    return {
        "quick_half_us": round(statistics.fmean(times[: len(times) // 2]), 1),
        "median_us": round(times[len(times) // 2], 1),
    }


@contextmanager
def child(run: Callable[[], None]) -> Iterator[None]:
    """A forked process that runs until the block ends."""
    cores = sorted(os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
        try:
            os.sched_setaffinity(0, cores[-1:])
            run()
        finally:
            os._exit(0)
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def pipe_trip(data: bytes, rounds: int) -> dict[str, float]:
    """A pipe each way."""
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def read_all() -> bool:
        left = len(data)
        while left:
            got = len(os.read(to_child, left))
            if not got:
                return False
            left -= got
        return True

    def answer() -> None:
        while read_all():
            os.write(from_child, ANSWER)

    def trip() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(from_parent, view) :]
        os.read(to_parent, 8)

    with child(answer):
        return timed(trip, rounds)


def settings_of(rank: int, leader: str = "") -> WorkerSettings:
    """Of one of two ranks."""
    group = GroupSettings(tensor_parallel_size=2, rank=rank, leader=leader)
    return WorkerSettings("bench", cluster_key="cd" * 32, group=group)


def channel_trip(plan: StepPlan, rounds: int, *, near: bool) -> dict[str, float]:
    """The channel of a group; `near`: over shared memory, as between ranks of one host, else TCP."""
    to_child, from_parent = os.pipe()

    def follow() -> None:
        address = os.read(to_child, 100).decode()
        joining = join(settings_of(1, address), host_id() if near else "elsewhere")
        receiver = StepReceiver(joining.steps, joining.ring)
        while True:
            receiver.receive()
            receiver.answer(ANSWER)

    with child(follow):
        meeting = Meeting(settings_of(0), host_id(), 8 << 20)
        os.write(from_parent, meeting.address.encode())
        (member,) = meeting.wait(10.0)
        sender = StepSender([member.steps], meeting.ring)
        return timed(lambda: sender.parts(sender.send_plan(plan)), rounds)


def ray_trips(plans: dict[str, bytes], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """An actor call and a compiled graph of one actor, for every plan."""
    import ray
    from ray.dag import InputNode

    @ray.remote(num_cpus=0)
    class Follower:
        def step(self, data: bytes) -> bytes:
            return ANSWER

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for name, data in plans.items():
            found[name] = _ray_rows(Follower.remote, InputNode, data, rounds)  # type: ignore[attr-defined]
    finally:
        ray.shutdown()
    return found


def _ray_rows(make: Callable[[], Any], node: Any, data: bytes, rounds: int) -> dict[str, dict[str, float]]:
    import ray

    called, compiled = make(), make()
    row = {"ray_actor_call": timed(lambda: ray.get(called.step.remote(data)), rounds)}
    with node() as given:
        graph = compiled.step.bind(given).experimental_compile()
    row["ray_compiled_graph"] = timed(lambda: ray.get(graph.execute(data)), rounds)
    graph.teardown()
    return row


def measure(rounds: int, *, with_ray: bool) -> dict[str, object]:
    """Round trips by plan and carrier, and the ratios that matter."""
    plans = {name: plan_of(*shape) for name, shape in SHAPES.items()}
    encoded = {name: encode_plan(plan) for name, plan in plans.items()}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, plan in plans.items():
        rows[name] = {
            "pipe": pipe_trip(encoded[name], rounds),
            "step_channel": channel_trip(plan, rounds, near=True),
            "step_channel_tcp": channel_trip(plan, rounds, near=False),
        }
    if with_ray:
        for name, more in ray_trips(encoded, rounds // 2).items():
            rows[name] |= more
    ratios = {}
    for name, row in rows.items():
        own = row["step_channel"]["median_us"]
        ratios[name] = {other: round(own / each["median_us"], 3) for other, each in row.items()}
    return {
        "plan_bytes": {name: len(data) for name, data in encoded.items()},
        "round_trips": rows,
        "step_channel_over": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result there too")
    args = parser.parse_args()
    assert threading.active_count() == 1, "the followers are forked"
    result = {"what": "step channel", **provenance(), **measure(args.rounds, with_ray=not args.no_ray)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
