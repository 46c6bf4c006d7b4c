"""A local cluster of oracle workers whose every request is written down, and which is judged by all laws at its end.

    async with lawful(oracle_workers(1, 2, pace), router, plan=plan, log_file=tmp_path / "log") as court:
        await court.streams.run(requests)          # or anything else with court.cluster
        court.cluster.kill("decode-0")

Leaving the block waits until the workers are at rest, asks each for its account, stops the cluster, and fails with
every violation. `court.row()` is the line that the fault table prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fakes.fault_plan import FaultPlan, planned_workers
from fakes.oracle_cluster import KEY, Expected, Streams, oracle_says

from penstock.cluster.ledger import laws
from penstock.cluster.ledger.entries import Entry, Terminal, Violation
from penstock.cluster.ledger.footprint import Footprint
from penstock.cluster.local import LocalCluster
from penstock.cluster.metrics import Metrics
from penstock.cluster.subprocess_host import SubprocessHost
from penstock.cluster.supervision import Backoff
from penstock.router.journey import RequestReport
from penstock.router.settings import RouterSettings
from penstock.workers.audit import EndedAttempt, WorkerAudit
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode, GenerateRequest, Tokens
from penstock.workers.rpc import Conversation, RpcServer, WorkerClient
from penstock.workers.settings import WorkerSettings

REST_S = 20.0
_POLLERS = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")
MEMORY_SHARE = 0.25  # of a test process, whose own collections and caches grow; the soak holds it to 2 %


@dataclasses.dataclass
class Auditor:
    """Asks one incarnation of a worker again and again, each time for what is new."""

    client: WorkerClient
    ends: list[EndedAttempt] = dataclasses.field(default_factory=list)  # that are not judged yet
    next_end: int = 0

    async def ask(self) -> WorkerAudit:
        """Its account, with all ends that are not judged yet."""
        while True:
            audit = WorkerAudit.from_plain(await self.client.audit(self.next_end))
            account = audit.account
            assert account.ended_before == self.next_end, "ends were forgotten before they were judged"
            self.ends += account.ended
            self.next_end = account.next_end
            if account.next_end == account.ended_in_all:
                return dataclasses.replace(audit, account=dataclasses.replace(account, ended=tuple(self.ends)))


class Court:
    """One cluster before the ledger's laws."""

    def __init__(self, cluster: LocalCluster, plan: FaultPlan | None, expected: Expected = oracle_says) -> None:
        self.cluster = cluster
        self.expected = expected
        self.plan = plan
        self.reports: list[RequestReport] = []
        self.metrics = Metrics()
        self.streams: Streams
        self.violations: list[Violation] = []
        self.audits: list[WorkerAudit] = []
        self.left = 0  # processes, after the end
        self._requests: dict[str, GenerateRequest] = {}
        self._auditors: dict[str, Auditor] = {}  # by address; a channel for every question would cost memory

    def observe(self, report: RequestReport) -> None:
        self.reports.append(report)
        self.metrics.report(report)

    async def run(self, requests: Sequence[GenerateRequest], timeout_s: float = 60.0) -> None:
        """All of them to their ends."""
        self.expect(requests)
        await asyncio.wait_for(self.streams.run(requests), timeout_s)

    def expect(self, requests: Sequence[GenerateRequest]) -> None:
        """These will be asked; the oracle must know them."""
        self._requests |= {request.request_id: request for request in requests}

    def oracle(self, entry: Entry) -> Tokens:
        return self.expected(self._requests[entry.request_id])

    @property
    def entries(self) -> list[Entry]:
        return self.streams.recorder.entries

    def terminals(self) -> Counter[str]:
        return Counter(entry.terminal.value for entry in self.entries)

    async def rest(self) -> None:
        """Waits until every request is reported and every worker holds nothing, and keeps their accounts."""
        deadline = time.monotonic() + REST_S
        while True:
            with contextlib.suppress(RefusedError, KeyError):
                self.audits = [await self._audit(s.id) for s in self.cluster.fleet.workers() if s.state == "ready"]
                busy = any(a.account.sequences + a.account.sessions + a.account.lingering for a in self.audits)
                if not busy and not self.cluster.generator.router._journeys:
                    return
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.05)

    async def _audit(self, worker_id: str) -> WorkerAudit:
        address = self.cluster.process(worker_id).address
        if address not in self._auditors:
            self._auditors[address] = Auditor(WorkerClient(address, KEY))
        return await self._auditors[address].ask()

    async def hang_up(self, *, on_all: bool = True) -> None:
        """Close the channels to the workers that were asked, or to those of them that are gone."""
        alive = set() if on_all else {entry.address for entry in self.cluster.supervisor.roster.entries}
        for address in self._auditors.keys() - alive:
            await self._auditors.pop(address).client.close()

    def judge(self) -> None:
        """L1 to L7."""
        entries, audits = self.entries, self.audits
        counters = {
            sample.labels["state"]: sample.value
            for metric in self.metrics.request_terminal.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
        by_id = {report.request_id: report for report in self.reports}
        for entry in entries:
            report = by_id.get(entry.request_id)
            if report is not None and entry.terminal is Terminal.COMPLETED:
                entry.usage = report.prompt_tokens, report.generated_tokens
        self.violations += [
            *laws.ends_once(entries, audits),
            *laws.whole_prefix(entries, audits, self.oracle),
            *laws.blocks_back(audits),
            *laws.transfers_end(audits),
            *laws.nothing_foreign(entries, self.oracle),
            *laws.usage_is_true(entries),
            *laws.counters_agree(entries, self.reports, counters),
        ]

    def begin_anew(self) -> None:
        """Forget what has been judged; the workers' accounts go on."""
        self.entries.clear()
        self.reports.clear()
        self._requests.clear()
        for auditor in self._auditors.values():
            auditor.ends.clear()
        self.metrics = Metrics()

    def require(self) -> None:
        """Fails with every violation found."""
        assert not self.violations, "\n".join(map(str, self.violations[:20]))

    def held(self) -> int:
        """Blocks that are not free at rest, over all workers."""
        return sum(a.account.blocks.total - a.account.blocks.blank - a.account.blocks.idle for a in self.audits)

    def row(self, name: str) -> str:
        """What the fault table prints of this run."""
        fired = dict(self.plan.fired()) if self.plan is not None and self.plan.faults else "by the test"
        seed = self.plan.seed if self.plan is not None else 0
        return (
            f"{name} | seed {seed} | fired {fired} | {dict(self.terminals())} | "
            f"longest gap {self.streams.tally.longest_gap_s:.2f} s | blocks {self.held()} | processes {self.left}"
        )


@contextlib.asynccontextmanager
async def lawful(
    workers: Sequence[WorkerSettings],
    router: RouterSettings | None = None,
    *,
    plan: FaultPlan | None = None,
    log_file: Path | None = None,
    restart: bool = True,
    backoff: Backoff | None = None,
    expected: Expected = oracle_says,
) -> AsyncIterator[Court]:
    """See the module's docstring. Without `plan` the workers are plain ones. `expected`: what they say."""
    async with _grpc_awake():
        before = Footprint.take()
        host = SubprocessHost(log_file, planned_workers(plan)) if plan is not None else SubprocessHost(log_file)
        court: Court
        cluster = LocalCluster(
            workers, router, restart=restart, backoff=backoff, host=host, observe=lambda report: court.observe(report)
        )
        court = Court(cluster, plan, expected)
        async with cluster:
            court.streams = Streams(cluster, expected)
            yield court
            if restart:
                await cluster.wait_ready(REST_S)
            await court.rest()
            await court.hang_up()
            court.judge()
        after = await _footprint(before)
        court.left = len(after.processes - before.processes)
        court.violations += laws.footprint_back(before, after, MEMORY_SHARE)
    court.require()
    if plan is not None:
        plan.require_fired()


@contextlib.asynccontextmanager
async def _grpc_awake() -> AsyncIterator[None]:
    """What grpc opens with its first call, and keeps while any channel is open, is not to be counted."""
    server = RpcServer(_refuse, dict)
    client = WorkerClient(await server.start("127.0.0.1", 0))
    try:
        await client.status()
        yield
    finally:
        await client.close()
        await server.stop()


async def _refuse(_: Conversation) -> None:
    raise RefusedError(FailureCode.NO_WORKER, "nobody serves here")


async def _footprint(before: Footprint) -> Footprint:
    """As it is once what ends by itself has ended."""
    deadline = time.monotonic() + 5.0
    while True:
        after = Footprint.take()
        # grpc opens another poller of its own when its first stream is read, and keeps it.
        named = frozenset(each for each in after.descriptors if not each.endswith(_POLLERS))
        after = dataclasses.replace(after, descriptors=named)
        if time.monotonic() > deadline or not any(has - had for _, had, has in before.beside(after)):
            return after
        await asyncio.sleep(0.05)
