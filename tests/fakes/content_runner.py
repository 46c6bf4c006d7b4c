"""A runner whose KV slots hold (token, position) and whose next token hashes the context as its blocks hold it.

For scheduler tests: a lost, stale, foreign or early reused block shows at once, as a failed check or a wrong token.
"""

import zlib

import numpy as np

from penstock.workers.scheduler.plan import SampledLogprobs, StepPlan, StepResult

VOCAB = 50
_POSITION_BASE = 1 << 20
GARBAGE = -1


def next_token(context: list[int]) -> int:
    """The one right continuation."""
    return zlib.crc32(np.array(context, "<i4").tobytes()) % VOCAB


def expected_tokens(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """What a request for `prompt` must produce in all, stop token included."""
    context = list(prompt)
    while len(context) < len(prompt) + max_tokens:
        context.append(next_token(context))
        if context[-1] in stop_ids:
            break
    return context[len(prompt) :]


def slot_values(tokens: list[int], start: int = 0) -> np.ndarray:
    """What KV slots hold for these tokens at positions `start`..."""
    return np.array(tokens, np.int64) * _POSITION_BASE + np.arange(start, start + len(tokens))


class ContentRunner:
    """`blocks` int64 [num_blocks, block_size]."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = np.full((num_blocks, block_size), GARBAGE, np.int64)

    def run(self, plan: StepPlan) -> StepResult:
        for source, destination in plan.copies:
            self.blocks[destination] = self.blocks[source]
        sampled = []
        samples = set(plan.sample_rows.tolist())
        for row in range(len(plan.slots)):
            start, tokens = int(plan.starts[row]), plan.token_ids[plan.offsets[row] : plan.offsets[row + 1]]
            positions = np.arange(start, start + len(tokens))
            table = plan.block_tables[row]
            self.blocks[table[positions // self.block_size], positions % self.block_size] = slot_values(tokens, start)
            context = self.read(table, start + len(tokens))
            if row in samples:
                sampled.append(next_token(context))
        count = len(sampled)
        return StepResult(np.array(sampled, np.int32), _logprobs(count))

    def read(self, table: np.ndarray, length: int) -> list[int]:
        """The context of `length` tokens that these blocks hold."""
        positions = np.arange(length)
        values = self.blocks[table[positions // self.block_size], positions % self.block_size]
        if not np.array_equal(values % _POSITION_BASE, positions) or (values < 0).any():
            raise AssertionError(f"foreign or stale KV: {values.tolist()}")
        return (values // _POSITION_BASE).tolist()


def _logprobs(count: int) -> SampledLogprobs:
    return SampledLogprobs(
        chosen=np.arange(count, dtype=np.float32),
        top_counts=np.zeros(count, np.int32),
        top_ids=np.zeros((count, 1), np.int32),
        top_logprobs=np.zeros((count, 1), np.float32),
    )
