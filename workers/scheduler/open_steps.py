"""Steps that were planned and are not committed yet: at most two, since the next one may be planned while one runs.

Part of the scheduler: `chunked.py` makes an `OpenStep`, `scheduler.py` begins and ends them, `roster.py` asks whether a
row may be emptied. What a step will have done to its rows is known before its tokens are: `advance` takes that in, so
that a step after it can be planned. Knows rows, no blocks and no queue.

Invariant: a row that an open step computes is never emptied. Who leaves meanwhile stays in `leaving` until the last
such step has ended, so no block goes to another sequence, or to a peer that writes it, under a device at work.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.events import SequenceKey
from penstock.workers.scheduler.plan import I32, StepPlan
from penstock.workers.scheduler.row_layout import StepRows, TableSteps
from penstock.workers.scheduler.scoring import Spans
from penstock.workers.scheduler.table import DECODE, LAST, SequenceTable, Slots

MOST_STEPS = 2


@dataclass(slots=True, eq=False)
class OpenStep:
    """A plan, with what its commit needs again in the form the table likes best."""

    plan: StepPlan
    rows: StepRows
    sampled: Slots  # [S] slots of the rows that sample
    fields: I32  # [fields, S] of the table, of these rows, before the step
    spans: Spans  # prompt tokens scored, in the plan's order
    advanced: bool = False


class OpenSteps:
    """The steps under way over one table, oldest first."""

    def __init__(self, table: SequenceTable, over: TableSteps) -> None:
        self._table = table
        self._over = over
        self._steps: list[OpenStep] = []
        # Rows of sequences that are over; the key of those whose blocks a peer reads, to be held for it afterwards.
        self.leaving: dict[int, SequenceKey | None] = {}
        self.paused: set[int] = set()  # rows of sequences that may soon go on at a peer; looked up or set alike

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> OpenStep | None:
        """The step planned last, if it is not committed."""
        return self._steps[-1] if self._steps else None

    def begin(self, step: OpenStep) -> None:
        """It was planned."""
        self._steps.append(step)

    def oldest_is(self, plan: StepPlan) -> OpenStep:
        """The oldest step, whose plan this is. Raises IntegrityError if it is not."""
        if not self._steps or self._steps[0].plan is not plan:
            raise IntegrityError("this plan is not the step under way")
        return self._steps[0]

    def newest_is(self, plan: StepPlan) -> OpenStep:
        """The newest step, whose plan this is. Raises IntegrityError if it is not."""
        if not self._steps or self._steps[-1].plan is not plan:
            raise IntegrityError("this plan is not the step that was planned last")
        return self._steps[-1]

    def end(self, step: OpenStep) -> None:
        """It was committed or failed; the caller empties the rows that `freed` names."""
        self._steps.remove(step)

    def holds(self, slot: int) -> bool:
        """Whether an open step computes this row."""
        return any((step.rows.slots == slot).any() for step in self._steps)

    def freed(self) -> list[tuple[int, SequenceKey | None]]:
        """Rows to be emptied now, and for which reader their blocks are to be held; they are not leaving any more."""
        rows = [slot for slot in self.leaving if not self.holds(slot)]
        return [(slot, self.leaving.pop(slot)) for slot in rows]

    def leave(self, slot: int, reader: SequenceKey | None) -> None:
        """The row's sequence is over; nothing more is planned for it."""
        self._table.state[slot] = LAST
        self.leaving[slot] = reader

    def pause(self, slot: int) -> None:
        """Nothing more is planned for the row, until `resume`."""
        self.paused.add(slot)
        self._table.state[slot] = LAST

    def resume(self, slot: int) -> None:
        """The row decodes on."""
        self.paused.discard(slot)
        if slot not in self.leaving and self._table.length[slot] <= self._table.last_position[slot]:
            self._table.state[slot] = DECODE

    def reader_left(self, key: SequenceKey) -> None:
        """Nobody reads the blocks of this sequence any more."""
        for slot, reader in self.leaving.items():
            if reader == key:
                self.leaving[slot] = None

    def advance(self, step: OpenStep) -> None:
        """Take in what the step does to its rows whatever it samples; again: nothing."""
        if step.advanced:
            return
        step.advanced = True
        table = self._table
        self._over.advance(step.rows, step.plan.sample_rows)
        for slot in step.sampled[step.plan.num_decode :].tolist():
            if table.sequence_in(slot).sends_kv:  # whoever goes on with it, it is not this worker
                table.state[slot] = LAST
        for slot in (*self.leaving, *self.paused):
            table.state[slot] = LAST
