"""Real worker processes with the oracle: texts, death, drain, leases, epochs; alone and as prefill + decode pair."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fakes.fault_plan import Action, Fault, FaultPlan, planned_workers
from fakes.worker_process import CLUSTER_KEY, VOCAB, Attachment, WorkerProcess, oracle_settings

from penstock.workers.errors import RefusedError
from penstock.workers.fault_points import Point
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import (
    Cancel,
    FailureCode,
    Generate,
    GenerateRequest,
    KVSnapshot,
    Load,
    Prefill,
    RequestSnapshot,
    Reserve,
    Role,
    SamplingParams,
)
from penstock.workers.settings import RunnerSettings, TransferSettings

SLOW = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, oracle_step_s=0.02)

pytestmark = pytest.mark.timeout(60)


def request(salt: int, length: int = 40, max_tokens: int = 20, emitted: tuple[int, ...] = ()) -> GenerateRequest:
    prompt = tuple((salt * 131 + index * 17) % VOCAB for index in range(length))
    return GenerateRequest(f"q{salt}", prompt, SamplingParams(max_tokens), emitted)


def answer(asked: GenerateRequest) -> list[int]:
    return list(expected_tokens(asked.prompt, asked.sampling, VOCAB))


def found_in(folder: Path) -> list[str]:
    """Names of all files and folders in it."""
    return sorted(path.name for path in folder.rglob("*"))


async def status_when(router: Attachment, blocks_free: int, within_s: float = 5.0) -> dict[str, int]:
    """The load once every block is back, or what it was at the end."""
    give_up = time.monotonic() + within_s
    while True:
        load: dict[str, int] = (await router.client.status())["load"]
        if load["free_blocks"] == blocks_free and load["quarantined_blocks"] == load["transfers"] == 0:
            return load
        if time.monotonic() > give_up:
            raise AssertionError(f"blocks are missing: {load}")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("compiler", [True, False], ids=["C++", "numpy"])
async def test_texts_over_a_real_process(compiler: bool, tmp_path: Path) -> None:
    without = {"PATH": "", "HOME": str(tmp_path)}  # no compiler, and a cache in which nothing is compiled
    with WorkerProcess(oracle_settings(), environment=None if compiler else without) as worker:
        router = await Attachment.open(worker.address)
        asked = {slot: request(slot, 10 + slot % 90, 10 + slot % 30) for slot in range(200)}
        for slot, each in asked.items():
            router.send(Generate(slot, 1, each))
        await router.until(lambda: len(router.ends) == len(asked))
        wrong = [slot for slot, each in asked.items() if router.text(slot) != answer(each)]
        assert (wrong, router.failed) == ([], {})
        await status_when(router, worker.facts["num_blocks"])
        router.send(RequestSnapshot())
        await router.until(lambda: any(isinstance(message, KVSnapshot) for message in router.others))
        await router.until(lambda: any(isinstance(message, Load) for message in router.others))
        await router.close()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert found_in(tmp_path) == ([] if compiler else [".cache", "lock", "penstock"])


async def test_the_cluster_key_is_in_no_place_that_others_read() -> None:
    """Not in the process's arguments or environment, its first words, its status, nor the words for its settings."""
    settings = oracle_settings()
    with WorkerProcess(settings) as worker:
        router = await Attachment.open(worker.address)
        told = [json.dumps(worker.facts), json.dumps(await router.client.status()), repr(settings)]
        about = Path("/proc", str(worker.process.pid))
        told += [(about / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
        assert len(told[-1]) > 20
        assert [text for text in told if CLUSTER_KEY in text] == []
        await router.close()


async def test_a_killed_worker_is_noticed_at_once() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW)) as worker:
        router = await Attachment.open(worker.address)
        for slot in range(20):
            router.send(Generate(slot, 1, request(slot, max_tokens=200)))
        await router.until(lambda: len(router.tokens) == 20)
        began = time.monotonic()
        worker.process.kill()
        await router.until(lambda: router.lost is not None, 5)
        assert time.monotonic() - began < 3.0
        assert isinstance(router.lost, RefusedError)
        assert router.lost.code is FailureCode.WORKER_LOST
        for slot in range(20):
            text = router.text(slot)
            assert text == answer(request(slot, max_tokens=200))[: len(text)]
        await router.close()


async def test_sigterm_drains() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW)) as worker:
        router = await Attachment.open(worker.address)
        router.send(Generate(1, 1, request(1, max_tokens=30)))
        await router.until(lambda: len(router.text(1)) >= 2)
        worker.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        router.send(Generate(2, 1, request(2)))
        await router.until(lambda: (2, 1) in router.failed)
        assert router.failed[2, 1].code is FailureCode.DRAINING
        await router.until(lambda: router.lost is not None)
        assert router.text(1) == answer(request(1, max_tokens=30))
        assert worker.wait() == 0
        await router.close()


async def test_a_drain_that_takes_too_long_is_cut() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW, drain_s=0.3)) as worker:
        router = await Attachment.open(worker.address)
        router.send(Generate(1, 1, request(1, max_tokens=900)))
        await router.until(lambda: len(router.text(1)) >= 1)
        began = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        await router.until(lambda: router.lost is not None)
        assert worker.wait() == 0
        assert time.monotonic() - began < 6.0
        await router.close()


def test_a_worker_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with WorkerProcess(oracle_settings(parent_pid=parent.pid)) as worker:
            parent.kill()
            parent.wait(5)
            assert worker.wait(2) == 4
    finally:
        parent.kill()
        parent.wait(5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"runner": RunnerSettings(kind="magic")}, ("ConfigError", "unknown runner 'magic'")),
        ({"transfer": TransferSettings(transport="pigeon")}, ("ConfigError", "transport")),
        ({"host": "no-such-host.invalid"}, ("ConfigError", "cannot listen")),
    ],
)
def test_a_worker_that_cannot_start_says_why(changed: dict[str, object], says: tuple[str, str]) -> None:
    with WorkerProcess(oracle_settings(**changed)) as worker:
        assert worker.facts["error"] == says[0]
        assert says[1] in worker.facts["message"]
        assert worker.wait() == 1


async def test_a_router_that_falls_silent_is_cut_and_its_work_ended() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW)) as worker:
        silent = await Attachment.open(worker.address, "silent", lease_s=0.5)
        alive = await Attachment.open(worker.address, "alive")
        silent.send(Generate(1, 1, request(1, max_tokens=900)))
        await silent.until(lambda: silent.lost is not None, 5)
        await status_when(alive, worker.facts["num_blocks"])
        await silent.close()
        await alive.close()


async def test_a_broken_stream_ends_its_work_at_once() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW)) as worker:
        gone, watcher = await Attachment.open(worker.address, "gone"), await Attachment.open(worker.address, "watcher")
        gone.send(Generate(1, 1, request(1, max_tokens=900)))
        await gone.until(lambda: len(gone.text(1)) > 1)
        await gone.close()
        await status_when(watcher, worker.facts["num_blocks"], within_s=1.0)
        await watcher.close()


async def test_a_new_instance_of_a_router_fences_the_old_one() -> None:
    with WorkerProcess(oracle_settings(runner=SLOW)) as worker:
        old = await Attachment.open(worker.address, epoch=3)
        old.send(Generate(1, 1, request(1, max_tokens=900)))
        await old.until(lambda: len(old.text(1)) > 1)
        new = await Attachment.open(worker.address, epoch=4)
        new.send(Generate(1, 1, request(2)))
        await old.until(lambda: old.lost is not None, 5)
        await new.until(lambda: (1, 1) in new.ends)
        assert new.text(1) == answer(request(2))
        with pytest.raises(RefusedError, match="epoch 4") as refusal:
            await Attachment.open(worker.address, epoch=3)
        assert refusal.value.code is FailureCode.INCOMPATIBLE
        await old.close()
        await new.close()


# --- prefill + decode ---------------------------------------------------------------------------------------------


async def grant_and_prefill(prefill: Attachment, decode: Attachment, asked: dict[int, GenerateRequest]) -> None:
    for slot, each in asked.items():
        decode.send(Reserve(slot, 1, each))
    for slot, each in asked.items():
        await decode.until(lambda slot=slot: (slot, 1) in decode.granted)
        prefill.send(Prefill(slot, 1, each, decode.granted[slot, 1].grant))


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
async def test_split_over_two_processes(transport: str) -> None:
    wire = TransferSettings(transport=transport, lease_s=2.0)
    with (
        WorkerProcess(oracle_settings("p", role=Role.PREFILL, transfer=wire)) as p,
        WorkerProcess(oracle_settings("d", role=Role.DECODE, transfer=wire)) as d,
    ):
        prefill, decode = await Attachment.open(p.address), await Attachment.open(d.address)
        asked = {slot: request(slot, 20 + 3 * slot) for slot in range(100)}
        await grant_and_prefill(prefill, decode, asked)
        await decode.until(lambda: len(decode.ends) == len(asked))
        await prefill.until(lambda: len(prefill.tokens) == len(asked))
        for slot, each in asked.items():
            whole = answer(each)
            assert (prefill.text(slot), decode.text(slot)[1:]) == (whole[:1], whole[1:]), slot
        assert (prefill.failed, decode.failed) == ({}, {})
        await status_when(prefill, p.facts["num_blocks"])
        await status_when(decode, d.facts["num_blocks"])
        await prefill.close()
        await decode.close()


DIES_AFTER = FaultPlan((Fault(Point.TRANSFER_SENT, Action.KILL, after=7),))


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
async def test_prefill_dies_in_the_middle_of_its_blocks(transport: str) -> None:
    wire = TransferSettings(transport=transport, lease_s=2.0)
    with (
        WorkerProcess(oracle_settings("p", role=Role.PREFILL, transfer=wire), command=planned_workers(DIES_AFTER)) as p,
        WorkerProcess(oracle_settings("d", role=Role.DECODE, transfer=wire)) as d,
    ):
        prefill, decode = await Attachment.open(p.address), await Attachment.open(d.address)
        asked = {slot: request(slot, 400) for slot in range(4)}
        await grant_and_prefill(prefill, decode, asked)
        await prefill.until(lambda: prefill.lost is not None)
        assert p.wait() == -signal.SIGKILL
        await decode.until(lambda: len(decode.failed) == len(asked), 5)
        assert {failed.code for failed in decode.failed.values()} == {FailureCode.TRANSFER_FAILED}
        for slot in asked:
            emitted = tuple(token for token in prefill.text(slot) if token is not None)
            decode.send(Generate(slot, 2, request(slot, 400, emitted=emitted)))
        await decode.until(lambda: len(decode.ends) == len(asked))
        for slot, each in asked.items():
            begun = prefill.text(slot)
            assert begun + decode.text(slot, 2)[len(begun) :] == answer(each)
        await status_when(decode, d.facts["num_blocks"])
        await prefill.close()
        await decode.close()


async def test_decode_dies_and_prefill_gets_its_blocks_back() -> None:
    with (
        WorkerProcess(oracle_settings("p", role=Role.PREFILL, runner=SLOW)) as p,
        WorkerProcess(oracle_settings("d", role=Role.DECODE)) as d,
    ):
        prefill, decode = await Attachment.open(p.address), await Attachment.open(d.address)
        await grant_and_prefill(prefill, decode, {slot: request(slot, 700) for slot in range(4)})
        await asyncio.sleep(0.05)
        d.process.kill()
        await status_when(prefill, p.facts["num_blocks"])
        assert {failed.code for failed in prefill.failed.values()} <= {FailureCode.TRANSFER_FAILED}
        prefill.send(Generate(50, 1, request(50)))
        await prefill.until(lambda: (50, 1) in prefill.ends)
        assert prefill.text(50) == answer(request(50))
        await prefill.close()
        await decode.close()


async def test_cancel_while_blocks_move_frees_both_sides() -> None:
    with (
        WorkerProcess(oracle_settings("p", role=Role.PREFILL, runner=SLOW)) as p,
        WorkerProcess(oracle_settings("d", role=Role.DECODE, runner=SLOW)) as d,
    ):
        prefill, decode = await Attachment.open(p.address), await Attachment.open(d.address)
        await grant_and_prefill(prefill, decode, {slot: request(slot, 300, 200) for slot in range(8)})
        for slot in range(8):
            await asyncio.sleep(0.015)
            prefill.send(Cancel(slot, 1))
            decode.send(Cancel(slot, 1))
        await status_when(prefill, p.facts["num_blocks"], within_s=1.5)
        await status_when(decode, d.facts["num_blocks"], within_s=1.5)
        # The side whose cancel comes second may have heard of the first one by then.
        codes = {failed.code for failed in (*prefill.failed.values(), *decode.failed.values())}
        assert codes <= {FailureCode.TRANSFER_FAILED}
        await prefill.close()
        await decode.close()


def test_no_worker_is_left_behind() -> None:
    children = psutil.Process(os.getpid()).children(recursive=True)
    assert [child for child in children if "penstock.workers.process" in " ".join(child.cmdline())] == []
