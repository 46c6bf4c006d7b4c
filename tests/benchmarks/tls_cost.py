"""What encryption between processes costs: KV over TCP, and a message of a stream there and back, plain and over TLS.

    python tests/benchmarks/tls_cost.py [--rounds 9] [--json FILE]

Both ends are threads of this process, so that two cores bound both ways alike. Plain and TLS take turns; figures are
medians over rounds, of 64 blocks of 2 MiB without payload digests, and of 300 messages (Cancel, answered by Queued).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance
from fakes.certificates import Authority
from fakes.echo_worker import echo
from fakes.transfer_pair import Worker, make_session

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import WIRE_VERSION, Cancel, Hello
from penstock.workers.rpc import RpcServer, WorkerClient
from penstock.workers.settings import TransferSettings
from penstock.workers.tls import PeerTls, open_peer_tls
from penstock.workers.transfer.port import Arrived, Tail

BLOCKS, BLOCK_BYTES, MESSAGES = 64, 2 << 20, 300


def transfer_ends(tls: PeerTls | None) -> tuple[Worker, Worker]:
    """Sender and receiver with storages whose pages were written."""
    ends = []
    for name in ("p", "d"):
        storage = KVStorage.create(BLOCKS, BLOCK_BYTES)
        storage.data[:] = 1
        settings = TransferSettings(transport="tcp", digest="off")
        ends.append(Worker(name, storage, settings, tls=tls))
    return ends[0], ends[1]


def transfer_s(p: Worker, d: Worker) -> float:
    """One session of all blocks, from the offer to its arrival."""
    session, grant = make_session(d.storage, tuple(range(BLOCKS)), d.engine.address, 30.0)
    d.engine.expect(session)
    began = time.perf_counter()
    p.engine.start(grant)
    p.engine.offer(grant.session_id, [(block, block) for block in range(BLOCKS)])
    p.engine.finish(grant.session_id, Tail((7,)))
    arrived = d.wait(1, 60.0)
    taken = time.perf_counter() - began
    if not isinstance(arrived[0], Arrived):
        raise SystemExit(f"transfer failed: {arrived}")
    p.wait(1, 60.0)
    p.events.clear()
    d.events.clear()
    return taken


async def message_s(tls: PeerTls | None) -> float:
    """Mean time of a message there and back, on a stream that is warm."""
    server = RpcServer(echo, dict, "00" * 32, tls=tls)
    client = WorkerClient(await server.start("127.0.0.1", 0), "00" * 32, tls=tls)
    stream = await client.attach(Hello(WIRE_VERSION, "router", 1, 5.0))
    began = 0.0
    for number in range(MESSAGES + 30):
        if number == 30:
            began = time.perf_counter()
        stream.send(Cancel(number, 1))
        await stream.read()
    taken = (time.perf_counter() - began) / MESSAGES
    await stream.close()
    await client.close()
    await server.stop()
    return taken


def measure(rounds: int, tls: PeerTls) -> dict[str, Any]:
    """Medians of both, and their ratios."""
    kinds: dict[str, PeerTls | None] = {"plain": None, "tls": tls}
    transfers: dict[str, list[float]] = {kind: [] for kind in kinds}
    messages: dict[str, list[float]] = {kind: [] for kind in kinds}
    with contextlib.ExitStack() as stack:
        ends = {kind: transfer_ends(chosen) for kind, chosen in kinds.items()}
        for pair in ends.values():
            for end in pair:
                stack.callback(end.close)
            transfer_s(*pair)
        for _ in range(rounds):
            for kind, chosen in kinds.items():
                transfers[kind].append(transfer_s(*ends[kind]))
                messages[kind].append(asyncio.run(message_s(chosen)))
    kv = {kind: round(BLOCKS * BLOCK_BYTES / 1e9 / statistics.median(times), 2) for kind, times in transfers.items()}
    trip = {kind: round(1e6 * statistics.median(times)) for kind, times in messages.items()}
    best = {kind: round(BLOCKS * BLOCK_BYTES / 1e9 / min(times), 2) for kind, times in transfers.items()}
    return {"kv_gb_per_s": kv, "kv_best_gb_per_s": best, "message_us": trip}


def main() -> None:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tls = open_peer_tls(Authority(Path(folder)).settings())
        if tls is None:
            raise SystemExit("no TLS")
        found = measure(asked.rounds, tls)
    text = json.dumps({**provenance(), **found}, indent=2)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
