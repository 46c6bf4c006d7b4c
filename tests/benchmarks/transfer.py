"""KV transfer between two processes, as a fraction of what the machine can do, and the hand-over's latency.

    python tests/benchmarks/transfer.py [--blocks N] [--rounds R] [--load N] [--json FILE]

TCP against one contiguous send of the same bytes over a loopback socket with the system's buffers, read into memory
that is touched beforehand (`of_one_send`), and against the best that such a send reaches with other buffers
(`of_best_tuned_send`). Shared memory against `numpy.copyto` of the same bytes between touched arrays, and
between two KV storages. Limits and transfers take turns, round by round, in the same processes; figures are medians.
Each block size is run with blocks in order and (`scattered`) in a random order at both ends, and with every digest
policy. Every transfer's bytes are sampled and compared.

`handover_ms` is the time from the sender's `finish()` to the receiver's `Arrived`, at 1,000 prompt tokens in blocks of
16 (63 blocks of 128 KiB) of which the last chunk's 31 are offered right before `finish()`; `--load N` keeps N processes
spinning meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from penstock.workers.kv.storage import KVStorage
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Arrived, Incoming, OutgoingDone, Tail, TransferEvent
from penstock.workers.transfer.socket_loop import SAME_HOST_BUFFER_BYTES

BLOCK_KIB = (64, 256, 2048)
HANDOVER_KIB, PROMPT_BLOCKS, LAST_CHUNK_BLOCKS = 128, 63, 31
# The limit is a send with the system's own buffers; with others a bare socket can be faster, which is stated beside it.
RAW_BUFFERS = {"send": 0, "send_1024_kib_buffers": SAME_HOST_BUFFER_BYTES, "send_256_kib_buffers": 256 << 10}
POLICIES = ("off", "sampled", "full")
BURST = 4  # runs of a kind in a row: after a pause the system first has to find both processes a core
KIB = 1 << 10


class End:
    """One worker's transfer engine with a blocking inbox."""

    def __init__(self, name: str, storage: KVStorage, transport: str, digest: str) -> None:
        self.storage = storage
        self._woken = threading.Event()
        self.engine = TransferEngine(
            TransferSettings(transport=transport, digest=digest),
            storage,
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


def filled(num_blocks: int, block_bytes: int, seed: int) -> KVStorage:
    """A storage whose pages differ: pages never written would all be one page, which the cache holds."""
    storage = KVStorage.create(num_blocks, block_bytes)
    storage.data[:] = np.random.default_rng(seed).integers(0, 256, storage.data.shape, np.uint8)
    return storage


def checksum(storage: KVStorage, blocks: list[int]) -> int:
    """A sum over one byte of every page, weighted by place, so that misplaced blocks show."""
    sampled = storage.data[blocks, ::4096].astype(np.int64).sum(axis=1)
    return int((sampled * np.arange(1, len(blocks) + 1)).sum())


def receive(num_blocks: int, block_bytes: int, transport: str) -> None:
    """The child. Line in: blocks of a session to grant; lines out: the grant, then [time of arrival, checksum]."""
    storage = filled(num_blocks, block_bytes, 2)
    end = End("d", storage, transport, "full")  # a receiver checks whatever digest it is sent
    for line in sys.stdin:
        blocks = tuple(json.loads(line))
        generations = tuple(int(storage.generations[block]) for block in blocks)
        session_id = os.urandom(16)
        end.engine.expect(Incoming(session_id, 1, blocks, generations, 10.0))
        grant = Grant(session_id, "d", 1, end.engine.address, "", 0, blocks, generations, 10.0, "bench")
        print(json.dumps({**dataclasses.asdict(grant), "session_id": session_id.hex()}), flush=True)
        event = end.wait()
        at = time.monotonic()
        if not isinstance(event, Arrived):
            raise SystemExit(f"transfer failed: {event}")
        print(json.dumps([at, checksum(storage, list(blocks))]), flush=True)
    end.engine.stop()
    storage.close()


def ask(child: subprocess.Popen[str], line: str) -> Any:
    """Write a line if there is one, read one of JSON."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(line)
    child.stdin.flush()
    return json.loads(child.stdout.readline())


class Link:
    """One transport: sending engines, one per digest policy over one storage, and a receiving child."""

    def __init__(self, transport: str, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.storage = filled(num_blocks, block_bytes, 1)
        self.ends = {digest: End(f"p-{digest}", self.storage, transport, digest) for digest in POLICIES}
        arguments = ["--receive", str(num_blocks), str(block_bytes), transport]
        self._child = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def transfer(
        self, digest: str, sources: list[int], targets: list[int], early: int = 0
    ) -> tuple[float, float, float]:
        """Send blocks, `early` of them ahead. Returns times: before the offer, of finish(), of arrival."""
        fields = ask(self._child, json.dumps(targets) + "\n")
        fields["session_id"] = bytes.fromhex(fields["session_id"])
        grant = Grant(**{**fields, "blocks": tuple(fields["blocks"]), "generations": tuple(fields["generations"])})
        end = self.ends[digest]
        end.engine.start(grant)
        pairs = list(enumerate(sources))
        if early:
            end.engine.offer(grant.session_id, pairs[:early])
            time.sleep(0.03)
        begun = time.monotonic()
        end.engine.offer(grant.session_id, pairs[early:])
        finished = time.monotonic()
        end.engine.finish(grant.session_id, Tail((1,)))
        arrived, checked = ask(self._child, "")
        if checked != checksum(self.storage, sources):
            raise SystemExit("wrong bytes arrived")
        if not isinstance(end.wait(), OutgoingDone):
            raise SystemExit("transfer not acknowledged")
        return begun, finished, arrived

    def rate(self, digest: str, *, scattered: bool) -> float:
        """Bytes per second of one session over all blocks."""
        sources, targets = list(range(self.num_blocks)), list(range(self.num_blocks))
        if scattered:
            random.Random(3).shuffle(sources)
            random.Random(4).shuffle(targets)
        begun, _, arrived = self.transfer(digest, sources, targets)
        return self.num_blocks * self.block_bytes / (arrived - begun)

    def close(self) -> None:
        """End child and engines."""
        end_child(self._child)
        for end in self.ends.values():
            end.engine.stop()
        self.storage.close()


def end_child(child: subprocess.Popen[str]) -> None:
    """Close its pipes and wait."""
    assert child.stdin is not None
    child.stdin.close()
    child.wait(30)
    if child.stdout is not None:
        child.stdout.close()


def drain(size: int, buffer_bytes: int) -> None:
    """The child of `RawSocket`: accept one connection, read `size` bytes again and again, print the time of each."""
    target = memoryview(np.ones(size, np.uint8))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        sock, _ = server.accept()
        with sock:
            if buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            at = 0
            while count := sock.recv_into(target[at:]):
                at += count
                if at == size:
                    print(time.monotonic(), flush=True)
                    at = 0


class RawSocket:
    """The limit of TCP: one contiguous blocking send, one blocking reader. `buffer_bytes` 0: the system's choice."""

    def __init__(self, size: int, buffer_bytes: int) -> None:
        self._payload = memoryview(np.random.default_rng(5).integers(0, 256, size, np.uint8))
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--drain", str(size), str(buffer_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._sock = socket.create_connection(("127.0.0.1", ask(self._child, "")))
        if buffer_bytes:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)

    def rate(self) -> float:
        """Bytes per second of one send."""
        begun = time.monotonic()
        self._sock.sendall(self._payload)
        return len(self._payload) / (ask(self._child, "") - begun)

    def close(self) -> None:
        """End the child."""
        self._sock.close()
        end_child(self._child)


def copy_rate(target: np.ndarray, source: np.ndarray) -> float:
    """Bytes per second of one memory copy."""
    begun = time.monotonic()
    np.copyto(target, source)
    return source.nbytes / (time.monotonic() - begun)


def alternate(rounds: int, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median of each, all taking turns in an order that changes; the first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(1)
    for number in range(rounds + 1):
        for name, run in order.sample(list(runs.items()), len(runs)):
            burst = [run() for _ in range(BURST)]
            if number:
                rates[name] += burst
    return {name: statistics.median(values) for name, values in rates.items()}


def transfer_runs(link: Link) -> dict[str, Callable[[], float]]:
    """Every policy and order over one link."""
    return {
        f"{digest}{'_scattered' if scattered else ''}": lambda digest=digest, scattered=scattered: link.rate(
            digest, scattered=scattered
        )
        for digest in POLICIES
        for scattered in ((False, True) if digest == "off" else (False,))
    }


def figures(medians: dict[str, float], limits: tuple[str, ...], what: str) -> dict[str, float]:
    """GB/s of everything, and of the transfers the fraction of the fastest limit, which is `what`."""
    limit = max(medians[name] for name in limits)
    report = {f"{name}_gb_s": round(rate / 1e9, 2) for name, rate in medians.items()}
    for name, rate in medians.items():
        if name.split("_")[0] in POLICIES:
            report[f"{name}_of_{what}"] = round(rate / limit, 3)
    return report


def tcp_figures(num_blocks: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """TCP and its limits."""
    size = num_blocks * block_bytes
    link = Link("tcp", num_blocks, block_bytes)
    raw = {name: RawSocket(size, buffer_bytes) for name, buffer_bytes in RAW_BUFFERS.items()}
    medians = alternate(rounds, {**{name: part.rate for name, part in raw.items()}, **transfer_runs(link)})
    for part in (link, *raw.values()):
        part.close()
    system, *tuned = RAW_BUFFERS
    report = figures(medians, (system,), "one_send")
    best = max(medians[name] for name in tuned)
    report |= {f"{digest}_of_best_tuned_send": round(medians[digest] / best, 3) for digest in POLICIES}
    return report


def shared_memory_figures(num_blocks: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """Shared memory and its limits."""
    link = Link("shared_memory", num_blocks, block_bytes)
    arrays = [np.ones(num_blocks * block_bytes, np.uint8) for _ in range(2)]
    storage = filled(num_blocks, block_bytes, 6)
    runs = {
        "copy_of_arrays": lambda: copy_rate(arrays[0], arrays[1]),
        "copy_of_storages": lambda: copy_rate(storage.data, link.storage.data),
        **transfer_runs(link),
    }
    medians = alternate(rounds, runs)
    link.close()
    storage.close()
    return figures(medians, ("copy_of_arrays", "copy_of_storages"), "memory_copy")


def handover(transport: str, digest: str, repeats: int) -> dict[str, float]:
    """Milliseconds from finish() to Arrived at 1,000 prompt tokens."""
    link = Link(transport, PROMPT_BLOCKS, HANDOVER_KIB * KIB)
    blocks = list(range(PROMPT_BLOCKS))
    early = PROMPT_BLOCKS - LAST_CHUNK_BLOCKS
    times = []
    for _ in range(repeats + 1):
        _, finished, arrived = link.transfer(digest, blocks, blocks, early)
        times.append((arrived - finished) * 1e3)
    link.close()
    times = sorted(times[1:])
    return {"p50": round(times[len(times) // 2], 3), "p95": round(times[int(len(times) * 0.95)], 3)}


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Everything, as one JSON object."""
    sizes = {}
    for kib in options.block_kib:
        shape = (options.blocks * max(options.block_kib) // kib if options.same_bytes else options.blocks, kib * KIB)
        sizes[f"{kib} KiB"] = {
            "blocks": shape[0],
            "tcp": tcp_figures(*shape, options.rounds),
            "shared_memory": shared_memory_figures(*shape, options.rounds),
        }
    return {
        "what": "KV transfer",
        **provenance(),
        "spinning_processes": options.load,
        "rounds": options.rounds,
        "default_digest": TransferSettings().digest,
        "sizes": sizes,
        "handover_block_bytes": HANDOVER_KIB * KIB,
        "handover_ms": {
            f"{transport} {digest}": handover(transport, digest, options.repeats)
            for transport in ("shared_memory", "tcp")
            for digest in (("full", "off") if options.repeats else ())
        },
    }


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=64, help="blocks of one session")
    parser.add_argument("--block-kib", type=int, nargs="+", default=BLOCK_KIB)
    parser.add_argument("--same-bytes", action="store_true", help="as many smaller blocks as hold the same bytes")
    parser.add_argument("--rounds", type=int, default=15, help="turns of limits and transfers")
    parser.add_argument("--repeats", type=int, default=50, help="hand-overs per figure")
    parser.add_argument("--load", type=int, default=0, help="processes that spin meanwhile")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--receive", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--drain", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        receive(int(options.receive[0]), int(options.receive[1]), options.receive[2])
        return
    if options.drain:
        drain(*options.drain)
        return
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    try:
        text = json.dumps(measure(options), indent=1)
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
