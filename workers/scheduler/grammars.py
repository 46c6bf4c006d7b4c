"""Sequences whose text follows a grammar: they wait in the queue for their guide, then their rows follow it.

Part of the scheduler: `Scheduler.submit` asks for a guide, admission takes it from here, and every commit moves the
guides on. Knows masks and tokens; how a grammar is compiled and followed is the business of who gives the guides
(`workers/grammar_store.py`).

Invariant: a row with a grammar has a guide that stands after all of the row's tokens, and a mask that allows something.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import GrammarError
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.protocol import FailureCode, Tokens
from penstock.workers.scheduler.plan import I32

if TYPE_CHECKING:
    from penstock.workers.scheduler.roster import Roster
    from penstock.workers.scheduler.table import Slots


class Guide(Protocol):
    """One sequence's place in its grammar."""

    @property
    def mask(self) -> I32:
        """[ceil(V / 32)]: bit t % 32 of word t // 32 allows token t next. Changes with `advance`."""
        ...

    def advance(self, token: int) -> None:
        """The token was sampled and does not end the choice. Raises GrammarError where nothing can follow."""
        ...


class Guides(Protocol):
    """Who gives guides."""

    def begin(self, spec: GrammarSpec, emitted: Tokens) -> Future[Guide]:
        """A guide after the `emitted` tokens, to come. Raises nothing; the future may."""
        ...


def follow(roster: Roster, slots: Slots, tokens: I32, ends: NDArray[np.uint8]) -> None:
    """Move the guides of rows that go on by the token sampled for each; who cannot go on ends in a `RefusedEvent`."""
    edits = roster.table.edits
    for index in edits.guided_rows(slots).tolist():
        slot = int(slots[index])
        sequence = roster.table.sequences[slot]
        if ends[index] or sequence is None:  # a prefill that handed its KV over has left its row
            continue
        try:
            edits.advance(slot, int(tokens[index]))
        except GrammarError as error:
            roster.stop(sequence, FailureCode.GRAMMAR, f"structured output: {error}")
