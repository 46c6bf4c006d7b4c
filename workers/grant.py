"""A decode worker's promise of KV blocks, as it travels from the granter over the router to the sender.

Part of the protocol (`protocol.py`), which knows who says it when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.workers.protocol import Tokens


@dataclass(frozen=True, slots=True)
class Grant:
    """A decode worker's promise: these blocks of its pool wait for one request's KV until the lease ends.

    Block `i` of the context lands in `blocks[i - first_block]`; blocks before `first_block` are already there.
    """

    session_id: bytes  # 16 random bytes
    worker_id: str
    epoch: int  # the granting worker's incarnation
    address: str  # host:port of its transfer listener
    host_id: str  # equal ids: the two processes can share memory
    first_block: int
    blocks: Tokens
    generations: tuple[int, ...]  # of `blocks`, at the time of the grant
    lease_s: float
    compatibility: str = ""  # hash of layout, model revision and codec; must equal the sender's
    rank_addresses: tuple[str, ...] = ()  # as `address`, of the granting group's ranks above 0 in order

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all ranks of the granting group; each takes its own KV heads of every block."""
        return (self.address, *self.rank_addresses)
