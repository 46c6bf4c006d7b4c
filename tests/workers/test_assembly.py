"""A worker built in this process: it starts, serves, drains, and ends with its engine; wrong settings stop it."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes.worker_process import VOCAB, Attachment, oracle_settings

from penstock.workers.assembly import Worker, build_worker
from penstock.workers.errors import ConfigError
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import Generate, GenerateRequest, SamplingParams
from penstock.workers.settings import KVSettings, RunnerSettings

THREADS = ("engine", "rpc", "heartbeat")


@pytest.fixture
def worker() -> Iterator[Worker]:
    before = set(threading.enumerate())
    worker = build_worker(oracle_settings())
    yield worker
    worker.stop()
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name in THREADS] == []


async def test_it_serves_and_drains(worker: Worker) -> None:
    router = await Attachment.open(worker.start())
    prompt = tuple(range(50))
    router.send(Generate(1, 1, GenerateRequest("q", prompt, SamplingParams(9))))
    await router.until(lambda: (1, 1) in router.ends)
    assert tuple(router.text(1)) == expected_tokens(prompt, SamplingParams(9), VOCAB)
    assert not worker.drained
    worker.stop(drain_s=5.0)
    assert worker.drained
    assert worker.join(0)
    assert not worker.failed
    await router.until(lambda: router.lost is not None)
    await router.close()


def test_facts(worker: Worker) -> None:
    assert worker.facts.num_blocks == 4096
    assert worker.facts.kv_bytes == 4096 * 16 * 16
    assert worker.start() == worker.address


async def test_an_engine_that_fails_is_told(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr(worker._engine, "_take_inbox", broken)
    worker.start()
    assert worker.join(5)
    assert worker.failed


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"runner": RunnerSettings(kind="oracel")}, "unknown runner 'oracel'"),
        ({"kv": KVSettings(num_blocks=10)}, "one sequence of max_model_len 1024 needs 64"),
        ({"kv": KVSettings(memory_bytes=1000)}, "more KV memory"),
        ({"kv": KVSettings(memory_bytes=1 << 50)}, "MiB"),
    ],
)
def test_settings_that_cannot_work(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_worker(oracle_settings(**changed))
