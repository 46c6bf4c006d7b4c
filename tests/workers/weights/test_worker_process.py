"""A real worker process on a host with no file of the model: all from a running one, tokens as transformers gives."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
from fakes.exactness import CheckpointSpec, Reference, make_checkpoint
from fakes.weight_sources import taker
from fakes.worker_process import Attachment, WorkerProcess, oracle_settings

from penstock.workers.errors import ModelError
from penstock.workers.protocol import Generate, GenerateRequest, Load, SamplingParams
from penstock.workers.settings import KVSettings, RunnerSettings, WeightSettings, WorkerSettings

TOKENS = 12
PROMPTS = [tuple((17 * n + 5 * i) % 1000 + 1 for i in range(9 + 20 * n)) for n in range(4)]

pytestmark = pytest.mark.timeout(120)


def model_settings(worker_id: str, model_dir: Path, *peers: str, **weights: object) -> WorkerSettings:
    settings = oracle_settings(worker_id, kv=KVSettings(num_blocks=256), drain_s=20.0)
    return dataclasses.replace(
        settings,
        runner=RunnerSettings(model_dir=str(model_dir), dtype="float32"),
        weights=WeightSettings(**weights),  # type: ignore[arg-type]
        weight_peers=peers,
    )


async def test_a_worker_without_files_serves_what_transformers_gives(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", CheckpointSpec())
    reference = Reference(directory)
    with WorkerProcess(model_settings("source", directory)) as source:
        address = str(source.facts["weights_address"])
        bare = model_settings("taker", tmp_path / "nowhere", address, config_from_peer=True)
        with WorkerProcess(bare) as worker:
            assert worker.facts["weights_address"] == "", "it has no file to give"
            source.process.send_signal(signal.SIGKILL)  # it is not needed any more
            router = await Attachment.open(worker.address)
            for slot, prompt in enumerate(PROMPTS):
                router.send(Generate(slot, 1, GenerateRequest(f"q{slot}", prompt, SamplingParams(TOKENS))))
            await router.until(lambda: len(router.ends) == len(PROMPTS))
            verdict = reference.judge(PROMPTS, [router.text(slot) for slot in range(len(PROMPTS))])
            assert (verdict.steps, verdict.wrong) == (len(PROMPTS) * TOKENS, [])
            await router.until(lambda: any(isinstance(each, Load) for each in router.others))
            totals = next(each.totals for each in reversed(router.others) if isinstance(each, Load))
            assert totals.weights_from_peers > 1 << 20
            assert (totals.weights_from_disk, totals.weights_load_s > 0) == (0, True)
            await router.close()


async def test_a_worker_that_drains_gives_no_weights(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", CheckpointSpec(hidden=48, vocab=1024))
    with WorkerProcess(model_settings("source", directory)) as source:
        address = str(source.facts["weights_address"])
        early = taker(tmp_path / "none", address, config_from_peer=True)
        assert early.raw_config()["vocab_size"] == 1024
        early.stop()
        router = await Attachment.open(source.address)
        router.send(Generate(1, 1, GenerateRequest("q", (1, 2, 3), SamplingParams(900))))
        await router.until(lambda: len(router.text(1)) > 1)
        source.process.send_signal(signal.SIGTERM)
        await router.until(lambda: any(isinstance(each, Load) and each.draining for each in router.others))
        late = taker(tmp_path / "none", address, config_from_peer=True, patience_s=0.2)
        with pytest.raises(ModelError, match=r"no peer gives them.*it drains"):
            late.raw_config()
        await router.close()
