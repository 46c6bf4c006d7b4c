"""What sampled tokens mean for the sequences that sampled them. Whole columns at a time.

Called when a step's result is taken in (`row_layout.py`), and by the roster for tokens that came with a peer's KV.
Changes nothing; `native_rows.py` judges a step in C++.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.protocol import EndReason
from penstock.workers.scheduler.plan import I32
from penstock.workers.scheduler.table import LAST_POSITION, LENGTH, PROMPT_LENGTH, SequenceTable, Slots

Ends = NDArray[np.uint8]  # EndReason
_STOP, _LENGTH_END = np.uint8(EndReason.STOP), np.uint8(EndReason.LENGTH)


def judge_tokens(table: SequenceTable, slots: Slots, fields: I32, tokens: I32) -> tuple[I32, Ends]:
    """What one sampled token means for each row; `fields` are the table's of these rows, before it came.

    A stop token ends its choice unless more were to come before one may (`min_tokens`). Returns (index of the token
    among the generated ones, int32 [S]; EndReason, uint8 [S]).
    """
    positions = fields[LENGTH]
    starts: I32 = positions - fields[PROMPT_LENGTH]
    ends = (positions >= fields[LAST_POSITION]).view(np.uint8) * _LENGTH_END
    stop_ids = table.stop_ids.take(slots, axis=1)
    stopped = np.logical_or.reduce(stop_ids == tokens, axis=0) if len(stop_ids) > 1 else stop_ids[0] == tokens
    if table.edits.active:
        stopped &= starts >= table.edits.min_tokens[slots]
    ends[stopped] = _STOP
    return starts, ends
