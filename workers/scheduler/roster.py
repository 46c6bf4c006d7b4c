"""All sequences this worker knows, by key, and every way in which one can leave its place in the line or the batch.

Part of the scheduler: `scheduler.py` decides, this module carries out: enter, preempt, end, refuse, and what transfer
events do to a sequence. Knows no budgets and no plans.

Invariant: every known sequence either stands in `waiting` or has a slot in `table`, never both. A row whose sequence is
over stays while a step under way computes it (`open_steps.py`).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import EndReason, FailureCode, Tokens
from penstock.workers.scheduler.events import (
    EndedEvent,
    GrantedEvent,
    PreemptedEvent,
    RefusedEvent,
    SchedulerEvent,
    SequenceKey,
    TakenOverEvent,
    Work,
)
from penstock.workers.scheduler.grammars import follow
from penstock.workers.scheduler.judgement import judge_tokens
from penstock.workers.scheduler.memory import SequenceMemory
from penstock.workers.scheduler.native_rows import steps_over
from penstock.workers.scheduler.open_steps import OpenSteps
from penstock.workers.scheduler.router_names import RouterNames
from penstock.workers.scheduler.sequence import Sequence
from penstock.workers.scheduler.table import DECODE, LENGTH, PREFILL, RESERVED, SequenceTable
from penstock.workers.scheduler.waiting import WaitingQueue


class Roster:
    """The sequences of one worker, over its table and memory."""

    def __init__(self, table: SequenceTable, memory: SequenceMemory, layout: KVLayout) -> None:
        self.table = table
        self.memory = memory
        self.waiting = WaitingQueue()
        self.steps = steps_over(table)
        self.under_way = OpenSteps(table, self.steps)
        self.routers = RouterNames()
        self.events: list[SchedulerEvent] = []
        self.preemptions = 0
        self._layout = layout
        self._known: dict[SequenceKey, Sequence] = {}

    def find(self, key: SequenceKey) -> Sequence | None:
        """The sequence under this key, if it has not ended."""
        return self._known.get(key)

    def known_keys(self) -> list[SequenceKey]:
        """Keys of all sequences that have not ended."""
        return list(self._known)

    def enter(self, sequence: Sequence) -> None:
        """A new sequence joins the queue."""
        self._known[sequence.key] = sequence
        self.waiting.push(sequence)

    def forget(self, sequence: Sequence) -> None:
        """The key is over; the caller deals with its row."""
        if sequence.guided is not None:
            sequence.guided.cancel()
        sequence.loading = False
        del self._known[sequence.key]
        self.routers.leave(sequence.router_index)

    def end(self, sequence: Sequence) -> None:
        """The sequence leaves, wherever it is. Blocks that a transfer may still touch linger under its key."""
        self.forget(sequence)
        slot = sequence.slot
        if slot is None:
            self.waiting.remove(sequence)
        elif self.table.state[slot] == RESERVED:
            takes_over, context = sequence.takes_over, len(sequence.context)
            end = int(self.table.num_blocks[slot]) if takes_over else self._layout.blocks_for(context)
            self.memory.quarantine_reserved(slot, sequence.key, sequence.granted, end)
        elif sequence.offered > sequence.first_block:
            self._vacate(slot, sequence.key)
        else:
            self._vacate(slot)

    def refuse(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        """The sequence leaves with a `RefusedEvent`; no transfer may touch its blocks any more."""
        self.forget(sequence)
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence.slot)
        self.events.append(RefusedEvent(sequence.key, code, message))

    def stop(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        """A running sequence leaves with a `RefusedEvent`, as if it had ended: a transfer may touch its blocks."""
        self.end(sequence)
        self.events.append(RefusedEvent(sequence.key, code, message))

    def cancel(self, key: SequenceKey) -> None:
        """The router does not want it any more. Events not yet taken for the key are withdrawn."""
        sequence = self._known.get(key)
        if sequence is None:
            return
        withdrawn = [event for event in self.events if event.key == key]
        self.events = [event for event in self.events if event.key != key]
        if sequence.slot is not None and any(isinstance(event, GrantedEvent) for event in withdrawn):
            # Nobody has seen the grant, so nobody can write the blocks.
            self.forget(sequence)
            self.memory.release(sequence.slot)
        else:
            self.end(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Give all its blocks back and wait at the queue's front with every known token, to be recomputed here."""
        slot = sequence.slot
        if slot is None:
            return
        sequence.context = self.table.tokens[slot, : self.table.length[slot]].copy()
        sequence.preemptions += 1
        sequence.looked_below = False
        sequence.work = Work.GENERATE
        self.preemptions += 1
        self.memory.release(slot)
        self.waiting.push(sequence)
        self.events.append(PreemptedEvent(sequence.key))

    def requeue(self, sequence: Sequence) -> None:
        """Give its blocks back and stand in line again as if it had not been admitted: nothing of it was computed."""
        slot = sequence.slot
        if slot is not None:
            self.memory.release(slot)
            self.waiting.push(sequence)

    def lose_bank(self, bank: int) -> None:
        """A bank's blocks are gone: its sequences are computed again elsewhere, where that is possible here.

        What a peer was to write or to read ends in a `RefusedEvent`.
        """
        for sequence in [each for each in self.table.sequences if each is not None and each.bank == bank]:
            slot = sequence.slot
            if slot is None:
                continue
            if sequence.sends_kv or self.table.state[slot] == RESERVED:
                self.refuse(sequence, FailureCode.TRANSFER_FAILED, "the KV blocks were lost with their rank")
            else:
                self.stay(sequence)
                self.preempt(sequence)
        for sequence in self.waiting.entries():
            if sequence.pinned == bank:
                self.refuse(sequence, FailureCode.TRANSFER_FAILED, "the KV blocks were lost with their rank")
        self.memory.lose(bank)

    def empty_left_rows(self) -> None:
        """A step has ended: rows that had to stay for it alone are emptied."""
        for slot, reader in self.under_way.freed():
            self._empty(slot, reader)

    @property
    def busy_keys(self) -> Collection[SequenceKey]:
        """Keys of sequences that are over and whose blocks a transfer may still touch."""
        leaving = self.under_way.leaving
        if not leaving:
            return self.memory.lingering
        return {*self.memory.lingering, *(key for key in leaving.values() if key is not None)}

    # --- moves to a peer (`moving.py`) ----------------------------------------------------------------------------

    def pause(self, sequence: Sequence) -> None:
        """Plan nothing more for a sequence that is about to leave."""
        if sequence.moving is not None and sequence.slot is not None and not sequence.moving.paused:
            sequence.moving.paused = True
            self.under_way.pause(sequence.slot)

    def stay(self, sequence: Sequence) -> None:
        """Its move is off: it goes on here. Nobody reads its blocks any more."""
        if sequence.moving is not None and sequence.slot is not None:
            if sequence.moving.paused:
                self.under_way.resume(sequence.slot)
            sequence.moving = None
            sequence.first_block = sequence.offered = 0

    def leave(self, key: SequenceKey) -> None:
        """A paused sequence goes on at the peer: it is over here, and nobody reads its blocks any more."""
        sequence = self._known.get(key)
        if sequence is not None and sequence.slot is not None:
            self.forget(sequence)
            self._vacate(sequence.slot)

    def settle(self, key: SequenceKey) -> bool:
        """Nobody reads the blocks of a sequence that is over. False: none of that key is."""
        self.under_way.reader_left(key)
        return self.memory.settle(key)

    def _vacate(self, slot: int, reader: SequenceKey | None = None) -> None:
        """The row's sequence is over. `reader`: under this key a peer reads its blocks."""
        self.under_way.paused.discard(slot)
        if self.under_way.holds(slot):
            self.under_way.leave(slot, reader)
        else:
            self._empty(slot, reader)

    def _empty(self, slot: int, reader: SequenceKey | None) -> None:
        if reader is None:
            self.memory.release(slot)
        else:
            self.memory.hold_for_reader(slot, reader)

    # --- transfer events ------------------------------------------------------------------------------------------

    def kv_arrived(self, key: SequenceKey, tokens: Tokens) -> None:
        """A reservation's KV is whole and verified; it decodes from `tokens` on, unless they end it."""
        sequence = self._reserved(key)
        if sequence is None or sequence.slot is None:
            return
        if not tokens:
            self.refuse(sequence, FailureCode.TRANSFER_FAILED, "the KV came without a first token")
            return
        slot = sequence.slot
        self.table.computed[slot] = len(sequence.context)
        self.memory.publish_row(slot, len(sequence.context))
        if self._append(sequence, slot, tokens) and len(tokens) > 1:
            self._prepare_many(sequence, slot)

    def take_over(self, key: SequenceKey, tokens: Tokens) -> None:
        """Go on with a sequence that ran elsewhere, whose KV is here for all tokens but the last.

        `tokens`: those its request did not have.
        """
        sequence = self._reserved(key)
        if sequence is None or sequence.slot is None:
            return
        slot = sequence.slot
        known = len(sequence.context) + len(tokens)
        if known - 1 > int(self.table.capacity[slot]):
            self.refuse(sequence, FailureCode.TRANSFER_FAILED, "more tokens came than blocks were granted for")
            return
        self.table.computed[slot] = min(known - 1, len(sequence.context))
        if not self._append(sequence, slot, tokens):
            return
        self.table.computed[slot] = known - 1
        self.table.state[slot] = DECODE
        self.memory.publish_row(slot, known - 1)
        # The peer has said them itself, with their logprobs; only if it died at that moment this is needed.
        if tokens and sequence.request.sampling.logprobs is None:
            self.events.append(TakenOverEvent(sequence.key, len(sequence.request.emitted), tokens))

    def _append(self, sequence: Sequence, slot: int, tokens: Tokens) -> bool:
        """Tokens that came with the KV. False: one of them ended the sequence."""
        row, first = np.array([slot]), len(sequence.request.emitted)
        for count, token in enumerate(tokens, start=1):
            fields, sampled = self.table.fields[:, row], np.array([token], np.int32)
            self.table.lengthen(row, fields)
            self.table.store_tokens(row, fields[LENGTH], sampled)
            _, ends = judge_tokens(self.table, row, fields, sampled)
            if ends[0]:
                self.events.append(EndedEvent(sequence.key, first, tokens[:count], EndReason(int(ends[0]))))
                self.forget(sequence)
                self.memory.release(slot)
                return False
            follow(self, row, sampled, ends)
            if sequence.slot is None:
                return False
        return True

    def kv_failed(self, key: SequenceKey, code: FailureCode = FailureCode.TRANSFER_FAILED) -> None:
        """A reservation's KV will not come, and nobody writes its blocks any more."""
        sequence = self._reserved(key)
        if sequence is not None:
            self.refuse(sequence, code, "the KV blocks did not arrive")

    def kv_sent(self, key: SequenceKey) -> None:
        """Nobody reads the blocks of a sending prefill any more: it was acknowledged, or the transfer failed."""
        if self.memory.settle(key):
            return
        self.under_way.reader_left(key)
        sequence = self._known.get(key)
        if sequence is not None and sequence.sends_kv:
            self.refuse(sequence, FailureCode.TRANSFER_FAILED, "the decode worker took no more KV blocks")

    def _reserved(self, key: SequenceKey) -> Sequence | None:
        """The reservation under this key; settles blocks of a cancelled one instead, where there are such."""
        if self.memory.settle(key):
            return None
        sequence = self._known.get(key)
        if sequence is None or sequence.slot is None or self.table.state[sequence.slot] != RESERVED:
            return None
        return sequence

    def _prepare_many(self, sequence: Sequence, slot: int) -> None:
        """Several tokens came at once: their KV is one prefill chunk, for which blocks must be there."""
        self.table.state[slot] = PREFILL
        while self.table.num_blocks[slot] * self._layout.block_size < self.table.length[slot]:
            if not self.memory.grow(np.array([slot])):
                self.preempt(sequence)
                return
