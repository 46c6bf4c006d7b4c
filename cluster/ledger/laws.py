"""The judge: one function per law over what was written down, each giving the violations it finds.

Called by `recorder.py` for single requests in production (`judge_entry`), and by tests for everything at rest. Pure:
entries, workers' audits, counters and footprints in, `Violation`s out. Whoever calls has waited until nothing runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from penstock.cluster.ledger.entries import Entry, Law, Terminal, Violation, terminal_of
from penstock.cluster.ledger.footprint import Footprint
from penstock.router.journey import RequestReport
from penstock.router.trail import MAX_KEPT, MOVED_LIVE
from penstock.workers.audit import WorkerAudit

CANARY = 8  # tokens in a row that only one answer can have
_GOOD_ENDS = ("stop", "length")
Oracle = Callable[[Entry], Sequence[int]]


def ends_once(entries: Sequence[Entry], audits: Sequence[WorkerAudit] = ()) -> Iterator[Violation]:
    """L1. Each entry has one end that is no silence, and no worker still works for anybody."""
    for entry in entries:
        if entry.terminal in (Terminal.PENDING, Terminal.SILENT) or entry.ends != 1:
            said = f"{entry.terminal} {entry.code}".strip()
            yield Violation(Law.ENDS_ONCE, entry.request_id, f"{said}, ended {entry.ends} times")
    for audit in audits:
        if audit.account.sequences:
            yield Violation(Law.ENDS_ONCE, audit.worker_id, f"{audit.account.sequences} sequences at rest")


def whole_prefix(
    entries: Sequence[Entry], audits: Sequence[WorkerAudit] = (), oracle: Oracle | None = None
) -> Iterator[Violation]:
    """L2. Tokens in their order, as the oracle has them; a completed request has all that a worker ended it with.

    An attempt that was given up may have ended too: its worker stood still, went on, and nobody listened any more.
    """
    ended = _good_ends(audits)
    for entry in entries:
        problem = _gap(entry) or (_against(entry, oracle(entry)) if oracle is not None else "")
        if not problem and entry.terminal is Terminal.COMPLETED and not entry.cut:
            told = ended[entry.request_id]
            if told and len(entry.tokens) not in told:
                problem = f"workers ended it after {told} tokens, its reader has {len(entry.tokens)}"
        if problem:
            yield Violation(Law.WHOLE_PREFIX, entry.request_id, problem)


def blocks_back(audits: Sequence[WorkerAudit]) -> Iterator[Violation]:
    """L3. Two counts of every block agree, and at rest all are free."""
    for audit in audits:
        account, held = audit.account, audit.account.blocks
        live, counted = held.allocated - held.freed - held.adopted, held.private + held.quarantined
        cached, free = held.adopted - held.reclaimed, held.blank + held.idle
        problems = [
            (account.fault, account.fault != ""),
            (f"allocated - freed = {live}, live {counted}", live != counted),
            (f"{cached} cached by count, {held.cached} by state", cached != held.cached),
            (f"{held.private} blocks held at rest", held.private != 0),
            (f"{held.cached - held.idle} cached blocks held at rest", held.cached != held.idle),
            (f"{held.quarantined} blocks in quarantine at rest", held.quarantined != 0),
            (f"{account.lingering} sequences keep blocks for a transfer", account.lingering != 0),
            (f"{free} blocks free of {held.total}", free != held.total),
        ]
        for evidence, found in problems:
            if found:
                yield Violation(Law.BLOCKS_BACK, audit.worker_id, evidence)


def transfers_end(audits: Sequence[WorkerAudit]) -> Iterator[Violation]:
    """L4. Every session has ended in one way, and what landed was checked."""
    for audit in audits:
        counted = Counter(audit.transfers)
        ended = counted["incoming_arrived"] + counted["incoming_failed"] + counted["incoming_closed"]
        sent = counted["outgoing_done"] + counted["outgoing_failed"]
        problems = [
            (f"{counted['incoming_started']} sessions expected, {ended} ended", counted["incoming_started"] != ended),
            (f"{counted['outgoing_started']} sessions opened, {sent} ended", counted["outgoing_started"] != sent),
            (f"{audit.account.sessions} sessions open for the engine", audit.account.sessions != 0),
            (
                f"{counted['fragments_landed']} blocks verified, {counted['fragments_checked']} checked",
                counted["fragments_landed"] > counted["fragments_checked"],
            ),
        ]
        for evidence, found in problems:
            if found:
                yield Violation(Law.TRANSFERS_END, audit.worker_id, evidence)


def nothing_foreign(entries: Sequence[Entry], oracle: Oracle) -> Iterator[Violation]:
    """L5. The first `CANARY` tokens of every right answer, where only one can have them, stand in no other."""
    canaries: dict[tuple[int, ...], str] = {}
    shared: set[tuple[int, ...]] = set()
    for entry in entries:
        canary = tuple(oracle(entry)[:CANARY])
        if len(canary) == CANARY and canaries.setdefault(canary, entry.request_id) != entry.request_id:
            shared.add(canary)
    for entry in entries:
        for begin in range(len(entry.tokens) - CANARY + 1):
            window = tuple(entry.tokens[begin : begin + CANARY])
            owner = canaries.get(window, entry.request_id)
            if owner != entry.request_id and window not in shared:
                yield Violation(Law.NOTHING_FOREIGN, entry.request_id, f"token {begin} on: the canary of {owner}")


def usage_is_true(entries: Sequence[Entry]) -> Iterator[Violation]:
    """L6. Who was told a usage was told what it got, once."""
    for entry in entries:
        if entry.usage is None:
            continue
        delivered = (entry.prompt_tokens, len(entry.tokens))
        if entry.usage != delivered:
            yield Violation(Law.USAGE_IS_TRUE, entry.request_id, f"usage {entry.usage}, delivered {delivered}")


def counters_agree(
    entries: Sequence[Entry],
    reports: Sequence[RequestReport],
    counters: Mapping[str, float] | None = None,
    roots: Counter[str] | None = None,
) -> Iterator[Violation]:
    """L7. One report per request, which says what its reader saw; metrics by terminal state; one root span each."""
    told = Counter(report.request_id for report in reports)
    by_id = {report.request_id: report for report in reports}
    for entry in entries:
        if told[entry.request_id] != 1:
            yield Violation(Law.COUNTERS_AGREE, entry.request_id, f"reported {told[entry.request_id]} times")
            continue
        yield from report_agrees(entry, by_id[entry.request_id])
    if counters is not None:
        seen = Counter(report.terminal for report in reports)
        for state in sorted({*seen, *counters}):
            if counters.get(state, 0) != seen[state]:
                evidence = f"the counter says {counters.get(state, 0):g}, the ledger {seen[state]}"
                yield Violation(Law.COUNTERS_AGREE, state, evidence)
    if roots is not None:
        for entry in entries:
            if roots[entry.request_id] != 1:
                yield Violation(Law.COUNTERS_AGREE, entry.request_id, f"{roots[entry.request_id]} root spans")


def report_agrees(entry: Entry, report: RequestReport) -> Iterator[Violation]:
    """L7 for one request. A reader that left may have missed an end, or tokens, that were on their way.

    One that was told no end, or a silent one, is L1's.
    """
    if entry.terminal in (Terminal.PENDING, Terminal.SILENT):
        return
    reported = terminal_of(report.terminal)
    left = entry.terminal is Terminal.CANCELLED
    if reported is not entry.terminal and not left:
        yield Violation(Law.COUNTERS_AGREE, entry.request_id, f"reported {report.terminal}, seen {entry.terminal}")
    if report.generated_tokens != len(entry.tokens) and not (left or entry.cut):
        evidence = f"reported {report.generated_tokens} tokens, delivered {len(entry.tokens)}"
        yield Violation(Law.COUNTERS_AGREE, entry.request_id, evidence)
    attempts = report.trail.attempts
    moved = sum(attempt.end == MOVED_LIVE for attempt in attempts)
    if moved != report.live_moves and len(attempts) < MAX_KEPT:
        evidence = f"reported {report.live_moves} live moves, its trail has {moved}"
        yield Violation(Law.COUNTERS_AGREE, entry.request_id, evidence)


def footprint_back(before: Footprint, after: Footprint, memory_share: float = 0.01) -> Iterator[Violation]:
    """L8. `memory_share`: how much more resident memory may be there."""
    for name, had, has in before.beside(after):
        extra = sorted(has - had)
        if extra:
            yield Violation(Law.FOOTPRINT_BACK, name, f"{len(extra)} more: {', '.join(map(str, extra[:5]))}")
    if after.resident > before.resident * (1 + memory_share):
        evidence = f"{before.resident >> 20} MiB before, {after.resident >> 20} MiB after"
        yield Violation(Law.FOOTPRINT_BACK, "memory", evidence)


def _gap(entry: Entry) -> str:
    if entry.misplaced:
        return f"{entry.misplaced} pieces did not follow the ones before"
    if entry.terminal is not Terminal.COMPLETED or entry.cut:
        return ""
    if entry.end == "length" and len(entry.tokens) != entry.max_tokens:
        return f"complete by its length with {len(entry.tokens)} of {entry.max_tokens} tokens"
    stops = entry.stop_token_ids
    if entry.end == "stop" and stops and entry.tokens[-1:] and entry.tokens[-1] not in stops:
        return "complete by a stop token that is none"
    return ""


def _against(entry: Entry, wanted: Sequence[int]) -> str:
    got = entry.tokens
    first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    if first is not None:
        return f"token {first} is not the oracle's"
    if len(got) > len(wanted):
        return f"{len(got)} tokens, the oracle has {len(wanted)}"
    if entry.terminal is Terminal.COMPLETED and not entry.cut and len(got) < len(wanted):
        return f"complete with {len(got)} of the oracle's {len(wanted)} tokens"
    return ""


def _good_ends(audits: Sequence[WorkerAudit]) -> dict[str, list[int]]:
    """How many tokens each request had where a worker ended it well.

    A prefill worker ends a request too that has its first token only; a reader sees that one once.
    """
    ended: dict[str, dict[int, int]] = {}
    for audit in audits:
        for attempt in audit.account.ended:
            if attempt.end in _GOOD_ENDS:
                ended.setdefault(attempt.request_id, {})[attempt.attempt] = attempt.tokens
    return _Told({request_id: list(attempts.values()) for request_id, attempts in ended.items()})


class _Told(dict[str, list[int]]):
    def __missing__(self, request_id: str) -> list[int]:
        return []
