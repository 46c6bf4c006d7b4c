"""A transfer engine whose blocks travel on lanes, over Gloo: what GPUs do by NCCL, in memory of the host.

`python -m fakes.lane_worker` is a sending one in its own process, to be killed or stopped, with JSON on stdin: `grant`
(fields of Grant, bytes as hex), `sources` (blocks), `block_bytes`, `key`, `plan` (a line), `share`
and `pieces` as of the engine, `lease_s`. It says "ready" before it reads, "offered" once all is handed over, and then
how its session ended.
"""

from __future__ import annotations

import json
import sys

import torch
from fakes.fault_plan import FaultPlan
from fakes.transfer_pair import Worker

from penstock.workers import fault_points
from penstock.workers.device_transfer import CardStorage
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.lane_frames import Lanes
from penstock.workers.transfer.port import Tail


class LaneWorker(Worker):
    """See `Worker`; `pool` holds the blocks."""

    def __init__(self, name: str, settings: TransferSettings, num_blocks: int, block_bytes: int, **options: object):
        self.pool = DeviceKVStorage.create(num_blocks, block_bytes, torch.device("cpu"))
        card = CardStorage(self.pool)
        super().__init__(name, card, settings, lanes=Lanes(settings, card), **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self.engine.stop()
        self.pool.close()


def main() -> None:
    """Send one session and report how it ended."""
    print("ready", flush=True)
    order = json.loads(sys.stdin.readline())
    fault_points.plan = FaultPlan.from_line(order["plan"])
    fields = order["grant"] | {"session_id": bytes.fromhex(order["grant"]["session_id"])}
    fields |= {name: tuple(fields[name]) for name in ("blocks", "generations", "more_addresses") if name in fields}
    grant = Grant(**fields)
    worker = LaneWorker(
        order["name"],
        TransferSettings(transport="nccl", lease_s=order["lease_s"], max_frame_bytes=1 << 20),
        max(order["sources"]) + 1,
        order["block_bytes"],
        cluster_key=order["key"],
        share=HeadShare(*order["share"]),
        pieces=order["pieces"],
    )
    # Every byte names its block, its place and this rank.
    numbers = torch.arange(worker.pool.tensor.numel()).view_as(worker.pool.tensor)
    worker.pool.tensor.copy_((numbers * 31 + (numbers >> 8) + 97 * order["share"][2]) % 251)
    worker.engine.start(grant)
    worker.engine.offer(grant.session_id, list(enumerate(order["sources"])))
    worker.engine.finish(grant.session_id, Tail((1, 2)))
    print("offered", flush=True)
    print(type(worker.wait(1, 30.0)[0]).__name__, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
