"""KV blocks from one process to another on one card: the hand-over part of `engine_gpu.py`.

This process grants sessions as a decode worker does; a child offers the blocks of its pool as a prefill worker does,
through the transfer engines that serve, with leases, epochs and generations. Both ways are measured: `tcp`, staged
through page-locked buffers, and `shared_memory`, which on a GPU means that this process maps the child's pool (CUDA
IPC) and copies on the card. Beside them: what a copy on the card and copies over PCIe reach without any session. With
two cards `nccl` is measured as well, the child on the second one; NCCL has no two ranks on one card, so with one only
a group of one rank is tried, which sends a frame to itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.gpu_limits import best_s, synchronize

from penstock.workers.device_transfer import CardStorage
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_backend, serve_store
from penstock.workers.protocol import Grant
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Arrived, Incoming, OutgoingDone, Tail, TransferEvent

BLOCK_BYTES = 2 << 20  # 16 tokens of an 8B model with 8 kv heads
COUNTS, REPEATS = (64, 256), 5
TOY_BLOCK_BYTES, TOY_COUNTS = 4096, (8,)
TRANSPORTS = ("shared_memory", "tcp", "nccl")
_WAIT_S = 30.0


class End:
    """One worker's pool and transfer engine."""

    def __init__(self, name: str, transport: str, device: torch.device, num_blocks: int, block_bytes: int) -> None:
        self.pool = DeviceKVStorage.create(num_blocks, block_bytes, device)
        self._woken = threading.Event()
        self.engine = TransferEngine(
            TransferSettings(transport=transport, digest="off"),
            CardStorage(self.pool),
            worker_id=name,
            epoch=1,
            host_id=host_id(),
            compatibility="bench",
            cluster_key="00" * 32,
            wake=self._woken.set,
            clock=time.monotonic,
        )

    def wait(self) -> TransferEvent:
        """The next event. Raises TimeoutError."""
        while True:
            events = self.engine.poll()
            if events:
                return events[0]
            if not self._woken.wait(_WAIT_S):
                raise TimeoutError("no transfer event")
            self._woken.clear()


def offer(transport: str, device: torch.device, num_blocks: int, block_bytes: int) -> None:
    """The child: a grant per line in, one line out when its session has ended."""
    end = End("p", transport, device, num_blocks, block_bytes)
    numbers = torch.arange(1, num_blocks + 2, device=device) % 251
    end.pool.tensor.copy_(numbers[:, None].expand(-1, block_bytes).to(torch.uint8))
    synchronize(device)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        fields = json.loads(line)
        fields |= {"session_id": bytes.fromhex(fields["session_id"])}
        grant = Grant(**{**fields, "blocks": tuple(fields["blocks"]), "generations": tuple(fields["generations"])})
        end.engine.start(grant)
        # Source and target differ, so that a block that stayed where it was cannot pass for one that came.
        count = len(grant.blocks)
        end.engine.offer(grant.session_id, [(place, count - 1 - place) for place in range(count)])
        end.engine.finish(grant.session_id, Tail((1,)))
        event = end.wait()
        sys.stdout.write(json.dumps(type(event).__name__ if isinstance(event, OutgoingDone) else str(event)) + "\n")
        sys.stdout.flush()
    end.engine.stop()


def measure(transport: str, device: torch.device, counts: Sequence[int], block_bytes: int) -> dict[str, Any]:
    """Rows of one transport. Raises RuntimeError where a session fails or a byte is wrong."""
    num_blocks = max(counts)
    theirs = torch.device("cuda", 1) if transport == "nccl" else device
    command = [sys.executable, __file__, "--child", transport, "--device", str(theirs)]
    command += ["--blocks", str(num_blocks), "--block-bytes", str(block_bytes)]
    end = End("d", transport, device, num_blocks, block_bytes)
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if child.stdout is None or child.stdin is None or child.stdout.readline() != "ready\n":
            raise RuntimeError("the other process did not start")
        rows = []
        for count in counts:
            times = [_session(end, child, count) for _ in range(1 + REPEATS)][1:]
            expected = (torch.arange(count, 0, -1, device=device) % 251).to(torch.uint8)
            if not bool((end.pool.tensor[:count] == expected[:, None]).all()):
                raise RuntimeError("blocks arrived with other content")
            median = statistics.median(times)
            rate = count * block_bytes / median
            rows.append({"blocks": count, "seconds": round(median, 6), "gigabytes_s": round(rate / 1e9, 3)})
        return {"rows": rows, "content": "equal"}
    finally:
        child.terminate()
        child.wait(10)
        end.engine.stop()
        end.pool.close()


def _session(end: End, child: subprocess.Popen[str], count: int) -> float:
    """Seconds from the grant on its way to the whole session's arrival."""
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("the other process has no pipes")
    blocks = tuple(range(count))
    generations = tuple(int(number) for number in end.pool.generations[:count])
    session_id = os.urandom(16)
    end.engine.expect(Incoming(session_id, 1, blocks, generations, _WAIT_S))
    grant = Grant(session_id, "d", 1, end.engine.address, host_id(), 0, blocks, generations, _WAIT_S, "bench")
    line = json.dumps({**dataclasses.asdict(grant), "session_id": session_id.hex()})
    begin = time.perf_counter()
    child.stdin.write(line + "\n")
    child.stdin.flush()
    event = end.wait()
    taken = time.perf_counter() - begin
    told = json.loads(child.stdout.readline())
    if not isinstance(event, Arrived) or told != "OutgoingDone":
        raise RuntimeError(f"the session failed: {event}; the sender says {told}")
    return taken


def plain_copies(device: torch.device, num_bytes: int) -> dict[str, float]:
    """GB/s without sessions: on the card, to page-locked memory, and from it."""
    a, b = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    works = {
        "card_gigabytes_s": lambda: b.copy_(a),
        "to_host_gigabytes_s": lambda: host.copy_(a),
        "from_host_gigabytes_s": lambda: a.copy_(host),
    }
    return {name: round(num_bytes / best_s(work, device) / 1e9, 3) for name, work in works.items()}


def nccl_alone(device: torch.device, num_bytes: int) -> dict[str, Any]:
    """A group of one rank that sends a frame to itself. Raises RuntimeError where NCCL refuses, or a byte is wrong."""
    store, address = serve_store("127.0.0.1", _WAIT_S)
    backend = open_backend(GroupPlace("alone", 0, 1, timeout_s=_WAIT_S), join_store(address, _WAIT_S), device)
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_(0, 256)

    def exchange() -> None:
        backend._start_coalescing(device)
        backend.send([source], 0, 0)
        backend.recv([target], 0, 0)
        backend._end_coalescing(device).wait()

    seconds = best_s(exchange, device)
    equal = bool((source == target).all())
    backend.abort()
    del store
    if not equal:
        raise RuntimeError("the frame arrived with other content")
    return {"gigabytes_s": round(num_bytes / seconds / 1e9, 3), "content": "equal"}


def skipped(transport: str, device: torch.device) -> str | None:
    """Why this machine cannot measure the transport; None where it can."""
    if device.type == "cpu" and transport == "shared_memory":
        return "memory of the CPU has no handle that a card's driver lends"
    if transport == "nccl" and (device.type == "cpu" or torch.cuda.device_count() < 2):
        return "NCCL needs a card for each of the two processes"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--spawned-at", type=float, default=0.0)
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--child", choices=TRANSPORTS)
    parser.add_argument("--device")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--block-bytes", type=int)
    args = parser.parse_args()
    if args.child:
        offer(args.child, torch.device(args.device), args.blocks, args.block_bytes)
        return
    result: dict[str, Any] = {}
    if args.toy or torch.cuda.is_available():
        device = torch.device("cpu") if args.toy else torch.device("cuda", 0)
        block_bytes, counts = (TOY_BLOCK_BYTES, TOY_COUNTS) if args.toy else (BLOCK_BYTES, COUNTS)
        result = {"block_bytes": block_bytes, "plain": plain_copies(device, block_bytes * max(counts))}
        for transport in TRANSPORTS:
            reason = skipped(transport, device)
            if reason is not None:
                result[transport] = {"skipped": reason}
                continue
            try:
                result[transport] = measure(transport, device, counts, block_bytes)
            except (RuntimeError, TimeoutError, OSError) as error:
                result[transport] = {"failed": f"{type(error).__name__}: {error}"}
        if device.type == "cuda":
            try:
                result["nccl_alone"] = nccl_alone(device, 64 * block_bytes)
            except (RuntimeError, ImportError) as error:
                result["nccl_alone"] = {"failed": f"{type(error).__name__}: {error}"}
    else:
        result["skipped"] = "no GPU is visible to this process"
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
