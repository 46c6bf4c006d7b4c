"""The cluster that `overload.py` asks too much of: worker processes and one ingress process, without Ray.

    python tests/benchmarks/overload_ingress.py SHAPE_JSON        # the ingress process; says its port in one line

`OverloadedCluster` starts that process, which owns the workers, and ends it; nothing is left afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import psutil

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.local import LocalCluster
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.router.settings import AdmissionSettings, RouterSettings
from penstock.workers.protocol import Role
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings, WorkerSettings

KEYS = {name: f"key-of-{name}" for name in ("a", "flood", "fair")}
CLUSTER_KEY = "ef" * 32
BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the workers are like, and what is asked of them. The oracle's line is that of a mid-sized GPU, slowed down
    so that two cores can carry the cluster and its callers: a step of 60 ms, and 0.1 ms more per token."""

    model: str = ""  # a directory; empty = the oracle
    mixed: int = 0
    prefill: int = 1
    decode: int = 2
    step_s: float = 0.06
    token_s: float = 0.0001
    max_num_seqs: int = 16
    chunk: int = 512
    vocab: int = 32000
    prompt_tokens: int = 200
    output_tokens: int = 48
    unloaded_requests: int = 6
    saturating_streams: int = 40
    ttft_target_s: float = 2.0
    tpot_target_s: float = 0.1

    @staticmethod
    def of_model(directory: Path) -> Shape:
        """One mixed worker over a checkpoint, on one core; `tpot_target_s` 0: still to be measured."""
        vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
        shape = Shape(str(directory), 1, 0, 0, vocab=vocab, prompt_tokens=64, output_tokens=32, max_num_seqs=64)
        return dataclasses.replace(shape, saturating_streams=32, chunk=128, tpot_target_s=0.0)

    def workers(self) -> list[WorkerSettings]:
        runner = RunnerSettings(
            kind="oracle", oracle_vocab=self.vocab, oracle_step_s=self.step_s, oracle_token_s=self.token_s
        )
        if self.model:
            runner = RunnerSettings(model_dir=self.model, threads=1)
        scheduler = SchedulerSettings(
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.chunk, max_model_len=1024
        )
        kv = KVSettings(block_size=BLOCK, num_blocks=self.max_num_seqs * 64)
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}
        return [
            WorkerSettings(
                f"{role.value}-{index}", role, cluster_key=CLUSTER_KEY, scheduler=scheduler, kv=kv, runner=runner
            )
            for role, count in counts.items()
            for index in range(count)
        ]

    def router(self) -> RouterSettings:
        return RouterSettings(
            admission=AdmissionSettings(ttft_target_s=self.ttft_target_s, tpot_target_s=self.tpot_target_s)
        )


class OverloadedCluster:
    """A context manager; `url` is where the ingress listens."""

    def __init__(self, shape: Shape) -> None:
        command = [sys.executable, __file__, json.dumps(dataclasses.asdict(shape))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = ""

    def __enter__(self) -> OverloadedCluster:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the ingress ended with {self._process.wait()}")
        self.url = f"http://127.0.0.1:{int(line)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            for process in [self._process, *children]:
                if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
                    process.kill()

    def memory(self) -> dict[str, float]:
        """Resident megabytes of the ingress and of all workers together."""
        ingress = psutil.Process(self._process.pid)
        workers = ingress.children(recursive=True)
        mb = 1 / (1 << 20)
        return {
            "ingress": round(ingress.memory_info().rss * mb, 1),
            "workers": round(sum(worker.memory_info().rss for worker in workers) * mb, 1),
        }


async def serve(shape: Shape) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    keys = tuple(KeyEntry(name, key_digest(key), tenant=name) for name, key in KEYS.items())
    settings = IngressSettings(("bench",), 1024, block_size=BLOCK, keys=keys)
    async with LocalCluster(shape.workers(), shape.router()) as cluster:
        app = build_app(settings, TextCodec(shape.vocab, ()), cluster.generator, Metrics(), cluster.fleet)
        listener = Listener(app, "127.0.0.1", 0, shared=False, drain_s=1.0)
        listener.start()
        print(listener.port, flush=True)
        await stop.wait()
        await listener.stop()


if __name__ == "__main__":
    asyncio.run(serve(Shape(**json.loads(sys.argv[1]))))
