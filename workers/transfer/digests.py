"""What stands for the bytes of a block on its way: the digest policy, and the digests of one frame's blocks.

Used by `sender.py` to state digests and by `receiver.py` to check them; pure. Each entry of an offer says in `checked`
how its digest was made, so the two ends need not be set alike:

    0      no digest: generations, counts and the transport's own checksums must do
    1      xxh3_64 of all bytes
    n > 1  xxh3_64 of every n-th stripe of 4 KiB, of the last one, and of the bytes behind it

A sampled digest notices every block that is not the one meant (stale, misplaced, never written), as each block is
looked at in many places, and every copy that stopped short; a single flipped byte it notices with probability 1/n.
Where the stripes begin follows from session and fragment, so that no part of a block is left out for ever.

`auto` is full where bytes cross a network, whose own checksum is of 16 bits, and sampled where one process copies
memory of another on the same host: no byte flips there that would not flip in any other memory, and a digest of all
bytes would cost a third of the rate (`tests/benchmarks/transfer.py`). Only on processors that keep stores in order,
though: elsewhere a generation can be read before the bytes it stands for, and the digest has the last word.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from penstock.workers.settings import TransferSettings

POLICIES = ("auto", "full", "sampled", "off")
STRIPE_BYTES = 4096
MAX_STRIDE = 1 << 16
STORES_IN_ORDER = platform.machine() in {"x86_64", "AMD64"}


def stride_of(settings: TransferSettings, *, inline: bool) -> int:
    """The value of `checked` that the settings ask for, for bytes sent (`inline`) or copied out of a shared segment."""
    if settings.digest == "off":
        return 0
    if settings.digest == "full" or (settings.digest == "auto" and (inline or not STORES_IN_ORDER)):
        return 1
    return max(1, min(MAX_STRIDE, round(1.0 / settings.digest_sample)))


def block_digest(block: memoryview, stride: int, session_id: bytes, fragment: int) -> int:
    """The digest of one block's bytes (contiguous) under `stride` > 0."""
    if stride == 1:
        return xxh3_64_intdigest(block)
    whole = len(block) // STRIPE_BYTES
    if whole == 0:
        return xxh3_64_intdigest(block)
    first = xxh3_64_intdigest(session_id, seed=fragment) % min(stride, whole)
    data = np.frombuffer(block, np.uint8)
    stripes = data[: whole * STRIPE_BYTES].reshape(whole, STRIPE_BYTES)[first::stride]
    return xxh3_64_intdigest(block[(whole - 1) * STRIPE_BYTES :], seed=xxh3_64_intdigest(stripes.tobytes()))


def state_digests(entries: NDArray[np.void], blocks: Sequence[memoryview], stride: int, session_id: bytes) -> None:
    """Fill `checked` and `digest` of each entry (OFFER_DTYPE), whose bytes are the block at the same place."""
    entries["checked"] = stride
    if stride:
        fragments = entries["fragment"].tolist()
        entries["digest"] = [
            block_digest(block, stride, session_id, fragment) for block, fragment in zip(blocks, fragments, strict=True)
        ]
