"""Each law finds what was planted against it, and no other law does; what is lawful gives no violation."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from penstock.cluster.ledger import laws
from penstock.cluster.ledger.entries import Entry, Law, Violation, terminal_of
from penstock.cluster.ledger.footprint import Footprint
from penstock.router.journey import RequestReport
from penstock.router.trail import Trail
from penstock.workers.audit import EndedAttempt, EngineAccount, WorkerAudit, is_sampled
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.kv.block_account import BlockAccount
from penstock.workers.protocol import EndReason, FailureCode

LENGTH = 12
BLOCKS = BlockAccount(total=64, allocated=40, freed=30, adopted=10, reclaimed=2, cached=8, idle=8, blank=56)
TRANSFERS = {"incoming_started": 3, "incoming_arrived": 2, "incoming_failed": 1, "fragments_landed": 9}


def answer(request_id: str) -> list[int]:
    return [int(request_id) * 100 + i for i in range(LENGTH)]


def oracle(entry: Entry) -> Sequence[int]:
    return answer(entry.request_id)


def completed(request_id: str) -> Entry:
    entry = Entry(request_id, 7, LENGTH, usage=(7, LENGTH))
    entry.give(0, tuple(answer(request_id)[:5]))
    entry.give(5, tuple(answer(request_id)[5:]))
    entry.finish("length")
    return entry


def report(entry: Entry, terminal: str = "completed") -> RequestReport:
    fields = {field.name: 0 for field in dataclasses.fields(RequestReport)}
    fields |= {"request_id": entry.request_id, "terminal": terminal, "end": EndReason.LENGTH, "trail": Trail()}
    return RequestReport(**{**fields, "prompt_tokens": 7, "generated_tokens": len(entry.tokens)})


@dataclasses.dataclass
class World:
    """A lawful run of three requests, for a test to break."""

    entries: list[Entry] = dataclasses.field(default_factory=lambda: [completed(str(n)) for n in range(1, 4)])
    blocks: BlockAccount = BLOCKS
    account: EngineAccount = dataclasses.field(
        default_factory=lambda: EngineAccount(
            BLOCKS, ended=tuple(EndedAttempt(str(n), 1, LENGTH, "length") for n in range(1, 4))
        )
    )
    transfers: dict[str, int] = dataclasses.field(default_factory=lambda: {**TRANSFERS, "fragments_checked": 9})
    reports: list[RequestReport] = dataclasses.field(default_factory=list)
    counters: dict[str, float] = dataclasses.field(default_factory=lambda: {"completed": 3})
    roots: Counter[str] = dataclasses.field(default_factory=lambda: Counter("123"))

    def violations(self) -> Iterator[Violation]:
        audit = WorkerAudit("d", 1, dataclasses.replace(self.account, blocks=self.blocks), self.transfers)
        reports = self.reports or [report(entry) for entry in self.entries]
        yield from laws.ends_once(self.entries, [audit])
        yield from laws.whole_prefix(self.entries, [audit], oracle)
        yield from laws.blocks_back([audit])
        yield from laws.transfers_end([audit])
        yield from laws.nothing_foreign(self.entries, oracle)
        yield from laws.usage_is_true(self.entries)
        yield from laws.counters_agree(self.entries, reports, self.counters, self.roots)


def with_entry(change: Callable[[Entry], None]) -> Callable[[World], None]:
    return lambda world: change(world.entries[1])


def with_blocks(**changed: int) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.blocks = dataclasses.replace(world.blocks, **changed)

    return change


def with_account(**changed: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.account = dataclasses.replace(world.account, **changed)

    return change


def drop_token(entry: Entry) -> None:
    """One token of the middle is lost, and everybody counts what is left."""
    del entry.tokens[4]
    entry.max_tokens, entry.usage = LENGTH - 1, (7, LENGTH - 1)


def show_foreign(world: World) -> None:
    """A request that was cancelled has another's canary at its end."""
    entry = Entry("2", 7, 2 * LENGTH)
    entry.give(0, tuple(answer("2") + answer("3")))
    entry.cancel()
    world.entries[1] = entry


def never_ends(world: World) -> None:
    world.entries[1] = Entry("2", 7, LENGTH)


def end_by_defect(entry: Entry) -> None:
    entry.ends = 0
    entry.fail(KeyError())


def report_otherwise(world: World) -> None:
    ends = {"1": "completed", "2": "internal", "3": "completed"}
    world.reports = [report(entry, ends[entry.request_id]) for entry in world.entries]
    world.counters = {"completed": 2, "internal": 1}


def move_unseen(world: World) -> None:
    world.reports = [dataclasses.replace(report(entry), live_moves=entry.request_id == "2") for entry in world.entries]


def charge_twice(entry: Entry) -> None:
    entry.usage = (7, 2 * LENGTH)


PLANTED: list[tuple[str, Law, Callable[[World], None]]] = [
    ("a request that never ends", Law.ENDS_ONCE, never_ends),
    ("a request that ends twice", Law.ENDS_ONCE, with_entry(lambda entry: entry.finish("length"))),
    ("a stream that ends by a defect", Law.ENDS_ONCE, with_entry(end_by_defect)),
    ("a sequence that still runs", Law.ENDS_ONCE, with_account(sequences=1)),
    ("a dropped token", Law.WHOLE_PREFIX, with_entry(drop_token)),
    ("a piece that skips an index", Law.WHOLE_PREFIX, with_entry(lambda entry: setattr(entry, "misplaced", 1))),
    ("a wrong token", Law.WHOLE_PREFIX, with_entry(lambda entry: entry.tokens.__setitem__(3, 9))),
    (
        "a request that no attempt ended with what its reader has",
        Law.WHOLE_PREFIX,
        with_account(ended=(EndedAttempt("2", 1, LENGTH - 1, "stop"), EndedAttempt("2", 2, LENGTH + 1, "length"))),
    ),
    (
        "tokens that a worker made and nobody got",
        Law.WHOLE_PREFIX,
        with_account(ended=(EndedAttempt("2", 1, LENGTH + 1, "length"),)),
    ),
    ("a leaked block", Law.BLOCKS_BACK, with_blocks(allocated=41, private=1, blank=55)),
    ("a block that was not counted", Law.BLOCKS_BACK, with_blocks(freed=29)),
    ("a cached block that somebody holds", Law.BLOCKS_BACK, with_blocks(idle=7)),
    ("a block in quarantine", Law.BLOCKS_BACK, with_blocks(allocated=41, quarantined=1, blank=55)),
    ("an engine that found a fault", Law.BLOCKS_BACK, with_account(fault="the stack is not the set of blank blocks")),
    ("a session that never ends", Law.TRANSFERS_END, lambda world: world.transfers.update(incoming_started=4)),
    ("a sent session that never ends", Law.TRANSFERS_END, lambda world: world.transfers.update(outgoing_started=1)),
    ("a session the engine waits for", Law.TRANSFERS_END, with_account(sessions=1)),
    ("blocks that nobody checked", Law.TRANSFERS_END, lambda world: world.transfers.update(fragments_checked=8)),
    ("usage counted twice", Law.USAGE_IS_TRUE, with_entry(charge_twice)),
    ("a counter that is too high", Law.COUNTERS_AGREE, lambda world: world.counters.update(completed=4)),
    ("a request with two root spans", Law.COUNTERS_AGREE, lambda world: world.roots.update("2")),
    ("a live move that the trail does not have", Law.COUNTERS_AGREE, move_unseen),
    ("a report that says otherwise", Law.COUNTERS_AGREE, report_otherwise),
]


def test_what_is_lawful_gives_no_violation() -> None:
    assert list(World().violations()) == []


@pytest.mark.parametrize(("name", "law", "plant"), PLANTED)
def test_exactly_that_law_finds_it(name: str, law: Law, plant: Callable[[World], None]) -> None:
    world = World()
    plant(world)
    found = list(world.violations())
    assert {violation.law for violation in found} == {law}, (name, found)


def test_a_foreign_canary_is_found_by_its_law() -> None:
    """The oracle sees it too: it is no prefix either."""
    world = World()
    show_foreign(world)
    (found,) = laws.nothing_foreign(world.entries, oracle)
    assert (found.law, found.who) == (Law.NOTHING_FOREIGN, "2")
    assert "canary of 3" in found.evidence


def test_requests_of_one_prompt_share_their_canary() -> None:
    entries = [completed("1"), completed("2")]
    entries[1].tokens = answer("1")
    assert list(laws.nothing_foreign(entries, lambda _: answer("1"))) == []


def found_since(before: Footprint) -> dict[str, str]:
    return {v.who: v.evidence for v in laws.footprint_back(before, Footprint.take(), memory_share=10.0)}


def test_a_leaked_descriptor_thread_and_process_are_found_and_then_gone() -> None:
    before = Footprint.take()
    assert found_since(before) == {}
    ends = os.pipe()
    assert "pipe" in found_since(before)["descriptors"]
    for end in ends:
        os.close(end)
    waits = threading.Event()
    thread = threading.Thread(target=waits.wait, name="leaked")
    thread.start()
    assert "leaked" in found_since(before)["threads"]
    waits.set()
    thread.join()
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert "sleep" in found_since(before)["processes"]
    finally:
        process.kill()
        process.wait()
    assert found_since(before) == {}


def test_memory_that_does_not_come_back_is_found() -> None:
    before = dataclasses.replace(Footprint.take(), resident=1 << 20)
    assert [v.who for v in laws.footprint_back(before, Footprint.take())] == ["memory"]


def test_how_errors_end_a_request() -> None:
    kinds = {
        FailureCode.OVERLOADED: "shed", FailureCode.BAD_REQUEST: "client_error", FailureCode.CANCELLED: "cancelled",
        FailureCode.WORKER_LOST: "failed", "completed": "completed",
    }  # fmt: skip
    assert {code: terminal_of(code).value for code in kinds} == kinds
    entry = Entry("1", 1, 1)
    entry.fail(RequestError("no"))
    assert entry.terminal == "client_error"
    entry = Entry("1", 1, 1)
    entry.fail(RefusedError(FailureCode.DRAINING, "no"))
    assert entry.terminal == "shed"


def test_the_sample_is_the_same_everywhere_and_as_large_as_asked() -> None:
    ids = [f"cmpl-{n}" for n in range(4000)]
    sampled = [name for name in ids if is_sampled(name, 0.1)]
    assert 300 < len(sampled) < 500
    assert all(is_sampled(name, 0.2) for name in sampled)
    assert all(is_sampled(name, 1.0) for name in ids)
    assert not any(is_sampled(name, 0.0) for name in ids)
