"""What a prefix cache of endless size on a single worker would find: the bound that routing is measured against.

Used by `report.py` and by `tests/benchmarks/routing.py`. Pure. A block is found if any earlier request (in order of
arrival) had the same tokens up to its end; the last token of a prompt is always computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.workers.kv.prefix_cache import chain
from penstock.workers.protocol import DIGEST_BYTES

_ROOT = b"\0" * DIGEST_BYTES


def infinite_cache_tokens(prompts: Iterable[Sequence[int]], block_size: int) -> tuple[int, int]:
    """(prompt tokens found, prompt tokens) over prompts in order of arrival."""
    seen: set[bytes] = set()
    found = total = 0
    for prompt in prompts:
        blocks = chain(_ROOT, prompt, block_size)
        known = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        found += min(known * block_size, len(prompt) - 1)
        total += len(prompt)
        seen.update(blocks)
    return found, total
