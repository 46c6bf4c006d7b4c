"""A sending transfer engine in its own process, to be killed: `python -m fakes.transfer_process` with JSON on stdin.

Keys: `grant` (fields of Grant, bytes as hex), `transport`, `num_blocks`, `block_bytes`, `plan` (a line), `key`. Offers
blocks 0.. whose bytes all equal their number plus one, then finishes and prints "done".
"""

from __future__ import annotations

import json
import sys
import threading
import time

from fakes.fault_plan import FaultPlan

from penstock.workers import fault_points
from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Tail


def main() -> None:
    """Send one session and report how it ended."""
    order = json.loads(sys.stdin.readline())
    fault_points.plan = FaultPlan.from_line(order["plan"])
    fields = order["grant"]
    grant = Grant(
        **{
            **fields,
            "session_id": bytes.fromhex(fields["session_id"]),
            "blocks": tuple(fields["blocks"]),
            "generations": tuple(fields["generations"]),
        }
    )
    storage = KVStorage.create(order["num_blocks"], order["block_bytes"])
    for block in range(order["num_blocks"]):
        storage.data[block] = block + 1
    ended = threading.Event()
    engine = TransferEngine(
        TransferSettings(transport=order["transport"]),
        storage,
        worker_id="p",
        epoch=1,
        host_id=host_id(),
        compatibility=grant.compatibility,
        cluster_key=order["key"],
        wake=ended.set,
        clock=time.monotonic,
    )
    engine.start(grant)
    engine.offer(grant.session_id, [(i, i) for i in range(len(grant.blocks))])
    engine.finish(grant.session_id, Tail((1,)))
    ended.wait(20)
    print(json.dumps([type(event).__name__ for event in engine.poll()]), flush=True)
    engine.stop()


if __name__ == "__main__":
    main()
