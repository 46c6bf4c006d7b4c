"""What breaks when: a `FaultPlan` of `Fault`s at the product's named points, the same for the same seed.

    plan = FaultPlan((Fault(Point.FRAME_OUT, Action.KILL, where="decode-0", after=3),), 7, tmp_path / "proof")
    host = SubprocessHost(log, command=planned_workers(plan))   # real processes; or: with armed(plan): ... in this one
    ...
    plan.require_fired()

A plan is one line (`to_line`, `from_line`), which `planned_worker.py` takes as its argument. Every firing is claimed,
and written to the `proof` directory, before it acts, by a file of its own: a process that kills itself has said so, and
one that is started again does not do it twice. Chances are drawn from (seed, fault, visit), so they do not depend on
which thread comes first elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from penstock.workers import fault_points
from penstock.workers.errors import DeviceError
from penstock.workers.fault_points import Point, Verdict

LAST_BYTE = -1
ALWAYS = 1 << 30  # times
PLANNED_WORKER = Path(__file__).with_name("planned_worker.py")


class Action(StrEnum):
    """What happens to who comes to the point."""

    KILL = "kill"  # SIGKILL to itself: no clean-up, no goodbye
    STOP = "stop"  # SIGSTOP to itself, SIGCONT after `seconds`
    RAISE = "raise"  # an exception of `error`
    DELAY = "delay"  # sleep `seconds`
    DROP = "drop"
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"  # one byte: `byte`, or one that the seed draws
    JUMP = "jump"  # at `clock`: it goes ahead by `seconds`, which may be negative, after as many
    DISK_FULL = "disk_full"  # OSError ENOSPC
    LIMIT = "limit"  # no more than `limit` open files from here on


_VERDICTS = {Action.DROP: Verdict.DROP, Action.DUPLICATE: Verdict.DUPLICATE, Action.CORRUPT: Verdict.CORRUPT}
_ERRORS: dict[str, Callable[[str], Exception]] = {
    "RuntimeError": RuntimeError,
    "MemoryError": MemoryError,
    "OSError": OSError,
    "DeviceError": DeviceError,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks. It fires at visit `after` of its point and from then on, `times` in all processes."""

    point: Point
    action: Action
    where: str = ""  # the worker; empty: any
    after: int = 1  # visits are counted by process, those that `where` and `items` let through
    times: int = 1
    items: tuple[int, ...] = ()  # fragments; empty: all
    chance: float = 1.0  # that a visit counts
    seconds: float = 0.0
    byte: int | None = LAST_BYTE  # None: drawn
    error: str = "RuntimeError"
    limit: int = 0

    def __post_init__(self) -> None:
        if self.error not in _ERRORS:
            raise ValueError(f"a fault raises one of {', '.join(_ERRORS)}, not {self.error}")


class FaultPlan:
    """See the module's docstring. Without `proof` firings are remembered by this object alone."""

    def __init__(self, faults: tuple[Fault, ...], seed: int = 0, proof: Path | None = None, process: str = "") -> None:
        """`process`: who comes to points that do not say whose they are."""
        self.faults = tuple(faults)
        self.seed = seed
        self.proof = proof
        self.process = process
        self._visits: Counter[int] = Counter()
        self._spent: Counter[int] = Counter()
        self._fired: list[dict[str, object]] = []
        self._lock = threading.Lock()
        self._byte = threading.local()
        if proof is not None:
            proof.mkdir(parents=True, exist_ok=True)

    # --- as a line ------------------------------------------------------------------------------------------------

    def to_line(self) -> str:
        return json.dumps(
            {"seed": self.seed, "proof": str(self.proof or ""), "faults": [asdict(fault) for fault in self.faults]}
        )

    @staticmethod
    def from_line(line: str, process: str = "") -> FaultPlan:
        raw = json.loads(line)
        faults = tuple(
            Fault(
                **{
                    **each,
                    "point": Point(each["point"]),
                    "action": Action(each["action"]),
                    "items": tuple(each["items"]),
                }
            )
            for each in raw["faults"]
        )
        return FaultPlan(faults, raw["seed"], Path(raw["proof"]) if raw["proof"] else None, process)

    # --- what the product asks (`fault_points.FaultPlan`) ---------------------------------------------------------

    def reach(self, point: Point, where: str, item: int | None = None) -> Verdict:
        verdict = Verdict.PASS
        for number, fault in enumerate(self.faults):
            if fault.point is point and self._concerns(fault, where, item) and self._is_due(number, fault):
                verdict = self._act(fault, verdict)
        return verdict

    def watches(self, where: str, *points: Point) -> bool:
        return any(
            fault.point in points and self._concerns(fault, where, None, any_item=True) and self._spent[n] < fault.times
            for n, fault in enumerate(self.faults)
        )

    def byte(self, size: int) -> int:
        wanted: int | None = self._byte.value
        return random.Random(f"{self.seed}/{len(self._fired)}").randrange(size) if wanted is None else wanted % size

    def clock(self, where: str, clock: Callable[[], float]) -> Callable[[], float]:
        jumps = [
            (number, fault)
            for number, fault in enumerate(self.faults)
            if fault.point is Point.CLOCK and self._concerns(fault, where, None)
        ]
        if not jumps:
            return clock

        def jumping() -> float:
            ahead = 0.0
            for number, fault in jumps:
                self._is_due(number, fault)
                ahead += fault.seconds * bool(self._spent[number])
            return clock() + ahead

        return jumping

    # --- what the test asks ---------------------------------------------------------------------------------------

    def fired(self) -> Counter[str]:
        """How often each action happened, in all processes: {"transfer.send drop": 2}."""
        return Counter(f"{line['point']} {line['action']}" for line in self.proofs())

    def proofs(self) -> list[dict[str, object]]:
        """One entry for each firing."""
        if self.proof is None:
            return list(self._fired)
        return [json.loads(path.read_text()) for path in sorted(self.proof.iterdir())]

    def require_fired(self) -> None:
        """Fails unless every fault of the plan has happened at least once."""
        happened = {line["fault"] for line in self.proofs()}
        never = [f"{fault.point} {fault.action}" for n, fault in enumerate(self.faults) if n not in happened]
        assert not never, f"faults that did not fire (seed {self.seed}): {', '.join(never)}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _concerns(self, fault: Fault, where: str, item: int | None, *, any_item: bool = False) -> bool:
        if fault.where and fault.where != (where or self.process):
            return False
        return any_item or not fault.items or item in fault.items

    def _is_due(self, number: int, fault: Fault) -> bool:
        """Count the visit; if the fault is due, claim and prove one firing."""
        with self._lock:
            if self._spent[number] >= fault.times:
                return False
            visit = self._visits[number] = self._visits[number] + 1
            if visit < fault.after or random.Random(f"{self.seed}/{number}/{visit}").random() >= fault.chance:
                return False
            return self._claim(number, fault, visit)

    def _claim(self, number: int, fault: Fault, visit: int) -> bool:
        while self._spent[number] < fault.times:
            firing = self._spent[number]
            self._spent[number] += 1
            line = {
                "fault": number,
                "point": fault.point,
                "action": fault.action,
                "where": fault.where or self.process,
                "visit": visit,
                "seed": self.seed,
                "pid": os.getpid(),
                "at": time.monotonic(),
            }
            if self.proof is None:
                self._fired.append(line)
                return True
            with contextlib.suppress(FileExistsError):
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                descriptor = os.open(self.proof / f"{number:03}-{firing:06}", flags, 0o600)
                os.write(descriptor, json.dumps(line).encode())
                os.close(descriptor)
                self._fired.append(line)
                return True
        return False

    def _act(self, fault: Fault, verdict: Verdict) -> Verdict:
        match fault.action:
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.STOP:
                stop_this_process(fault.seconds)
            case Action.DELAY:
                time.sleep(fault.seconds)
            case Action.RAISE:
                raise _ERRORS[fault.error](f"fault plan: {fault.point}")
            case Action.DISK_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case Action.LIMIT:
                resource.setrlimit(resource.RLIMIT_NOFILE, (fault.limit, fault.limit))
            case Action.CORRUPT:
                self._byte.value = fault.byte
        return _VERDICTS.get(fault.action, verdict)


def stop_this_process(seconds: float) -> None:
    """SIGSTOP, which somebody else must end."""
    waker = f"sleep {seconds}; kill -CONT {os.getpid()}"
    subprocess.Popen(["/bin/sh", "-c", waker], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


def planned_workers(plan: FaultPlan) -> tuple[str, ...]:
    """The command for a `SubprocessHost` whose workers break by this plan."""
    return (sys.executable, str(PLANNED_WORKER), plan.to_line())


@contextlib.contextmanager
def armed(plan: FaultPlan) -> Iterator[FaultPlan]:
    """This process breaks by the plan, for the time of the block."""
    fault_points.plan = plan
    try:
        yield plan
    finally:
        fault_points.plan = None
