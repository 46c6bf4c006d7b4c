"""Loading one rank's weights from a running peer over loopback, beside our own disk as it is and one held to a rate.

The source is a process of its own with the model's files. Every load is a process of its own too, as a worker's is:

    disk    the files, mapped, out of the page cache
    paced   the same bytes read from files at the disk's rate, which stands for network storage
    peer    the files are not here; everything comes from the source
    auto    files at the disk's rate beside the source: the worker measures both and chooses

Seconds are of the load alone (weights and what is made of them), the least of all rounds, which alternate. The peak of
the process's memory is taken as `sharded_load.py` takes it, `ratio` is peak over the rank's own bytes. `floor_s` is
the same bytes over one plain loopback connection, nothing done with them. Prints one JSON object.

    python tests/benchmarks/peer_load.py MODEL_DIR [--width 1,2] [--dtype bfloat16] [--rounds 3] [--disk-mb-s 200]
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from provenance import provenance
from sharded_load import Rank, _load_toy, kept, status

from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import parse_config
from penstock.workers.model.loading import load_decoder
from penstock.workers.settings import GroupSettings, RunnerSettings, WeightSettings, WorkerSettings
from penstock.workers.weights.intake import Intake
from penstock.workers.weights.offer import own_offer
from penstock.workers.weights.pace import Pace
from penstock.workers.weights.peers import Peers
from penstock.workers.weights.runs import Run
from penstock.workers.weights.server import WeightServer
from penstock.workers.weights.stored import Scratch, StoredWeights
from penstock.workers.weights.supply import WeightSupply

WAYS = ("disk", "paced", "peer", "auto")


def pace_files(bytes_per_s: float) -> None:
    """Let files of this process be read at most so fast; what a run spans counts, as it does on a disk."""
    pace, read = Pace(bytes_per_s, burst_s=0.0), StoredWeights.read

    def paced(self: StoredWeights, file: int, run: Run, scratch: Scratch) -> memoryview | None:
        pace.take(run.span)
        return read(self, file, run, scratch)

    StoredWeights.read = paced  # type: ignore[method-assign]


def stored(model_dir: Path) -> StoredWeights:
    """The model's files, open."""
    own = Checkpoint(model_dir)
    offer = own_offer(own)
    return StoredWeights(offer.terms, offer.config, [own.files[file.name].path for file in offer.terms.files])


def load(model_dir: Path, way: str, told: argparse.Namespace) -> dict[str, object]:
    """Load one rank here."""
    torch.set_num_threads(1)
    _load_toy(told.dtype)
    logging.basicConfig(level=logging.INFO)
    if way in ("paced", "auto"):
        pace_files(told.disk_mb_s * 1e6)
    with tempfile.TemporaryDirectory() as bare:
        settings = WorkerSettings(
            f"taker-{secrets.token_hex(4)}",
            cluster_key=told.key,
            runner=RunnerSettings(model_dir=bare if way == "peer" else str(model_dir)),
            weights=WeightSettings(source="disk" if way == "disk" else "auto", config_from_peer=True, serve=False),
            weight_peers=() if way == "disk" else (told.address,),
            group=GroupSettings(rank=told.rank),
        )
        Path("/proc/self/clear_refs").write_text("5")
        before, began = status("VmRSS"), time.perf_counter()
        supply = WeightSupply(settings)
        config = parse_config(supply.raw_config(), "config.json")
        checkpoint = paced_alone(supply, model_dir) if way == "paced" else supply.checkpoint()
        decoder = load_decoder(config, checkpoint, told.dtype, 512, group=Rank(told.rank, told.width))
        took = time.perf_counter() - began
        peak = status("VmHWM") - before
    supply.loaded()
    own = sum(kept(decoder._weights, {}).values())
    return {
        "s": round(took, 3),
        "from_peers": supply.tally.peer_bytes,
        "own_bytes": own,
        "ratio": round(peak / own, 3),
    }


def paced_alone(supply: WeightSupply, model_dir: Path) -> Checkpoint:
    """The checkpoint as it comes from the (paced) files, with no peer to ask."""
    offer, nobody = own_offer(Checkpoint(model_dir)), Peers((), "", WeightSettings())
    return supply._arriving(offer, Intake(nobody, stored(model_dir), 1.0))


def give(model_dir: Path, key: str) -> None:
    """Be the source until standard input ends."""
    server = WeightServer(stored(model_dir), "127.0.0.1", key, WeightSettings(serve_bytes_per_s=1 << 40))
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop()


def loopback_s(size: int) -> float:
    """So many bytes through one connection, half a megabyte at a time; the least of three."""
    best = float("inf")
    block = bytearray(1 << 19)
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def send(port: int = listener.getsockname()[1]) -> None:
                with socket.create_connection(("127.0.0.1", port)) as out:
                    for _ in range(size // len(block)):
                        out.sendall(block)

            thread = threading.Thread(target=send)
            began = time.perf_counter()
            thread.start()
            taken, _ = listener.accept()
            view = memoryview(bytearray(1 << 19))
            while taken.recv_into(view):
                pass
            best = min(best, time.perf_counter() - began)
            thread.join()
            taken.close()
    return best


def measure(told: argparse.Namespace, width: int, dtype: str) -> dict[str, object]:
    """All ways, rank 0 of `width`, round by round."""
    command = [sys.executable, __file__, str(told.model_dir), "--key", told.key, "--address", told.address]
    command += ["--disk-mb-s", str(told.disk_mb_s), "--dtype", dtype, "--width", str(width), "--rank", "0"]
    found: dict[str, list[dict[str, object]]] = {way: [] for way in WAYS}
    for _ in range(told.rounds):
        for way in WAYS:
            done = subprocess.run([*command, "--way", way], capture_output=True, text=True, check=True, timeout=300)
            found[way].append(json.loads(done.stdout))
    best = {way: min(float(str(each["s"])) for each in found[way]) for way in WAYS}
    size = int(str(found["peer"][0]["from_peers"]))
    return {
        "dtype": dtype,
        "width": width,
        "bytes": size,
        "seconds": best,
        "peer_mb_s": round(size / best["peer"] / 1e6),
        "paced_over_peer": round(best["paced"] / best["peer"], 2),
        "peer_over_disk": round(best["peer"] / best["disk"], 2),
        "floor_s": round(loopback_s(size), 3),
        "auto_chose_peer": all(int(str(each["from_peers"])) > 0 for each in found["auto"]),
        "worst_ratio": {way: max(float(str(each["ratio"])) for each in found[way]) for way in WAYS},
        "rounds": found,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--width", default="1,2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk-mb-s", type=float, default=200.0)
    for hidden in ("--way", "--key", "--address"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.way == "give":
        give(told.model_dir, told.key)
        return
    if told.way:
        told.width = int(told.width)
        print(json.dumps(load(told.model_dir, told.way, told)))
        return
    told.key = secrets.token_hex(32)
    command = [sys.executable, __file__, str(told.model_dir), "--way", "give", "--key", told.key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as source:
        if source.stdin is None or source.stdout is None:
            raise SystemExit("the source has no pipes")
        told.address = source.stdout.readline().strip()
        cases = [(dtype, int(width)) for dtype in told.dtype.split(",") for width in told.width.split(",")]
        results = [measure(told, width, dtype) for dtype, width in cases]
        source.stdin.close()
    about = {"model": told.model_dir.name, "disk_mb_s": told.disk_mb_s, "results": results}
    print(json.dumps({**provenance(), **about}, indent=1))


if __name__ == "__main__":
    main()
