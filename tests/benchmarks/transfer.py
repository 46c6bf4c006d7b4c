"""KV transfer between two processes: throughput against memcpy and a raw socket, and the hand-over's latency.

    python tests/benchmarks/transfer.py [--seconds S] [--block-kib K] [--load N]

Prints one JSON object. Throughput ratios compare with the limit measured in the same run: blocks over shared memory
with `numpy.copyto` between two storages, blocks over TCP with a bare loopback socket read into a storage. `handover_ms`
is the time from the sender's `finish()` to the receiver's `Arrived`, at 1,000 prompt tokens in blocks of 16 (63 blocks)
of which the last chunk's 31 are offered right before `finish()`; `--load N` keeps N processes spinning meanwhile. Every
transfer's bytes are sampled and compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
from provenance import provenance

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Arrived, Incoming, OutgoingDone, Tail, TransferEvent

POOL_BYTES = 128 << 20
PROMPT_BLOCKS, LAST_CHUNK_BLOCKS = 63, 31
MIB = 1 << 20


class End:
    """One worker's transfer engine with a blocking inbox."""

    def __init__(self, name: str, transport: str, block_bytes: int) -> None:
        self.storage = KVStorage.create(POOL_BYTES // block_bytes, block_bytes)
        self.storage.data[:] = 1 if name == "d" else 0
        self._woken = threading.Event()
        self.engine = TransferEngine(
            TransferSettings(transport=transport),
            self.storage,
            worker_id=name,
            epoch=1,
            host_id=host_id(),
            compatibility="bench",
            cluster_key="00" * 32,
            wake=self._woken.set,
            clock=time.monotonic,
        )

    def wait(self) -> TransferEvent:
        """The next event. Raises TimeoutError after 30 s."""
        while True:
            events = self.engine.poll()
            if events:
                return events[0]
            if not self._woken.wait(30):
                raise TimeoutError("no transfer event")
            self._woken.clear()

    def close(self) -> None:
        """Stop and free."""
        self.engine.stop()
        self.storage.close()


def receive(transport: str, block_bytes: int) -> None:
    """The child: one line in (number of blocks) grants a session, two lines out: the grant, the time of arrival."""
    end = End("d", transport, block_bytes)
    for line in sys.stdin:
        count = int(line)
        blocks = tuple(range(count))
        generations = tuple(int(number) for number in end.storage.generations[:count])
        session_id = os.urandom(16)
        end.engine.expect(Incoming(session_id, 1, blocks, generations, 10.0))
        grant = Grant(session_id, "d", 1, end.engine.address, "", 0, blocks, generations, 10.0, "bench")
        print(json.dumps({**dataclasses.asdict(grant), "session_id": session_id.hex()}), flush=True)
        event = end.wait()
        at = time.monotonic()
        if not isinstance(event, Arrived):
            raise SystemExit(f"transfer failed: {event}")
        print(json.dumps([at, int(end.storage.data[:count, ::4096].astype(np.int64).sum())]), flush=True)
    end.close()


class Link:
    """The parent's side: sends sessions to a receiving child."""

    def __init__(self, transport: str, block_bytes: int) -> None:
        self.end = End("p", transport, block_bytes)
        self.end.storage.data[:] = np.random.default_rng(1).integers(0, 256, self.end.storage.data.shape, np.uint8)
        command = [sys.executable, __file__, "--receive", transport, str(block_bytes)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def transfer(self, count: int, early: int = 0) -> tuple[float, float, float]:
        """Send `count` blocks, `early` of them ahead. Returns times: before the offer, of finish(), of arrival."""
        fields = self._ask(f"{count}\n")
        fields["session_id"] = bytes.fromhex(fields["session_id"])
        grant = Grant(**{**fields, "blocks": tuple(fields["blocks"]), "generations": tuple(fields["generations"])})
        engine = self.end.engine
        engine.start(grant)
        if early:
            engine.offer(grant.session_id, [(i, i) for i in range(early)])
            time.sleep(0.03)
        begun = time.monotonic()
        engine.offer(grant.session_id, [(i, i) for i in range(early, count)])
        finished = time.monotonic()
        engine.finish(grant.session_id, Tail((1,)))
        arrived, checksum = self._ask("")
        if checksum != int(self.end.storage.data[:count, ::4096].astype(np.int64).sum()):
            raise SystemExit("wrong bytes arrived")
        if not isinstance(self.end.wait(), OutgoingDone):
            raise SystemExit("transfer not acknowledged")
        return begun, finished, arrived

    def _ask(self, line: str) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(line)
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())

    def close(self) -> None:
        """End child and engine."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)
        if self._child.stdout is not None:
            self._child.stdout.close()
        self.end.close()


def throughput(transport: str, block_bytes: int, seconds: float) -> float:
    """Bytes per second of 64 MiB sessions."""
    link = Link(transport, block_bytes)
    count = (64 * MIB) // block_bytes
    link.transfer(count)
    rates = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(rates) < 5:
        begun, _, arrived = link.transfer(count)
        rates.append(count * block_bytes / (arrived - begun))
    link.close()
    return statistics.median(rates)


def handover(transport: str, block_bytes: int, repeats: int) -> dict[str, float]:
    """Milliseconds from finish() to Arrived at 1,000 prompt tokens."""
    link = Link(transport, block_bytes)
    link.transfer(PROMPT_BLOCKS)
    early = PROMPT_BLOCKS - LAST_CHUNK_BLOCKS
    times = []
    for _ in range(repeats):
        _, finished, arrived = link.transfer(PROMPT_BLOCKS, early)
        times.append((arrived - finished) * 1e3)
    link.close()
    times.sort()
    return {"p50": round(times[len(times) // 2], 3), "p95": round(times[int(len(times) * 0.95)], 3)}


def memcpy_rate(seconds: float) -> float:
    """Bytes per second of numpy.copyto of 64 MiB from one KV storage to another in one process."""
    source, target = (KVStorage.create(64, MIB) for _ in range(2))
    source.data[:], target.data[:] = 1, 2
    rates = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(rates) < 5:
        begun = time.monotonic()
        np.copyto(target.data, source.data)
        rates.append(source.data.nbytes / (time.monotonic() - begun))
    source.close()
    target.close()
    return statistics.median(rates)


def drain(address: str) -> None:
    """The child of `socket_rate`: read a bare socket into 64 MiB, block after block, and answer each round."""
    host, _, port = address.rpartition(":")
    storage, at = KVStorage.create(64, MIB), 0
    target = memoryview(storage.data.reshape(-1))
    with socket.create_connection((host, int(port))) as sock:
        while count := sock.recv_into(target[at : at + MIB]):
            at += count
            if at == len(target):
                sock.sendall(b".")
                at = 0
    target.release()
    storage.close()


def socket_rate(seconds: float) -> float:
    """Bytes per second of a bare loopback socket between two processes, 1 MiB writes."""
    storage, rates = KVStorage.create(64, MIB), []
    storage.data[:] = 1  # pages never written would all be one page, which the cache holds
    payload = memoryview(storage.data.reshape(-1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, __file__, "--drain", f"127.0.0.1:{server.getsockname()[1]}"]
        child = subprocess.Popen(command)
        sock, _ = server.accept()
        with sock:
            until = time.monotonic() + seconds
            while time.monotonic() < until or len(rates) < 5:
                begun = time.monotonic()
                for at in range(0, len(payload), MIB):
                    sock.sendall(payload[at : at + MIB])
                sock.recv(1)
                rates.append(len(payload) / (time.monotonic() - begun))
        child.wait(30)
    payload.release()
    storage.close()
    return statistics.median(rates)


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per throughput figure")
    parser.add_argument("--repeats", type=int, default=100, help="hand-overs per figure")
    parser.add_argument("--block-kib", type=int, default=128, help="block size of the hand-over figures")
    parser.add_argument("--load", type=int, default=0, help="processes that spin meanwhile")
    parser.add_argument("--receive", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--drain", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        receive(options.receive[0], int(options.receive[1]))
        return
    if options.drain:
        drain(options.drain)
        return
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    try:
        memcpy, raw = memcpy_rate(options.seconds), socket_rate(options.seconds)
        shared, tcp = (throughput(kind, MIB, options.seconds) for kind in ("shared_memory", "tcp"))
        kib = options.block_kib * 1024
        report = {
            "what": "KV transfer",
            **provenance(),
            "spinning_processes": options.load,
            "block_bytes": MIB,
            "memcpy_gb_s": round(memcpy / 1e9, 2),
            "shared_memory_gb_s": round(shared / 1e9, 2),
            "shared_memory_of_memcpy": round(shared / memcpy, 3),
            "raw_socket_gb_s": round(raw / 1e9, 2),
            "tcp_gb_s": round(tcp / 1e9, 2),
            "tcp_of_raw_socket": round(tcp / raw, 3),
            "handover_block_bytes": kib,
            "handover_ms": {kind: handover(kind, kib, options.repeats) for kind in ("shared_memory", "tcp")},
        }
        print(json.dumps(report, indent=2))
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


if __name__ == "__main__":
    main()
