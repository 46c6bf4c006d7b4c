"""Decode steps by replay, with a recorder that runs the same work again: equal bits, padding, and when to record."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.in_process import InProcessWorker, load_runner
from fakes.rerun_recorder import RerunRecorder

from penstock.workers.protocol import SamplingParams
from penstock.workers.runner import ModelRunner
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.settings import SchedulerSettings

SPEC = CheckpointSpec("qwen3", 4, 2, 32)
SCHEDULER = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)
NUM_BLOCKS = 40


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)
    return load_runner(directory, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64)


def open_worker(loaded, recorder=None, **options):
    runner = ModelRunner(dataclasses.replace(loaded._parts, recorder=recorder))
    return InProcessWorker(runner, num_blocks=NUM_BLOCKS, scheduler=SCHEDULER, on_device=True, **options)


def decode_plan(rows, seed=0):
    """`rows` sequences of different lengths, each with blocks of its own."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 60, rows).astype(np.int32)
    tables = rng.permutation(NUM_BLOCKS)[: rows * 4].reshape(rows, 4).astype(np.int32)
    zeros, real = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    return StepPlan(
        step=1,
        slots=np.arange(rows, dtype=np.int32),
        starts=starts,
        offsets=np.arange(rows + 1, dtype=np.int32),
        token_ids=rng.integers(0, SPEC.vocab, rows).astype(np.int32),
        block_tables=tables[:, : int(starts.max()) // 16 + 1],
        sample_rows=np.arange(rows, dtype=np.int32),
        sampling=SamplingBatch(real, zeros, real, real, np.zeros(rows, np.uint64), zeros, starts + 1, zeros - 1),
        num_decode=rows,
    )


def random_kv(worker, seed=0):
    kv = worker.storage.tensor.view(torch.float32)
    kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(seed)))
    return kv


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_a_replay_equals_the_eager_step_bit_for_bit(loaded, rows, bucket):
    worker = open_worker(loaded, RerunRecorder())
    graphs = worker.runner.graphs
    with torch.inference_mode():
        assert graphs.capture(bucket)
        for seed in range(4):
            plan = decode_plan(rows, seed)
            before = random_kv(worker, seed).clone()
            expected = graphs.padded(plan, bucket).clone()
            after = worker.storage.tensor.view(torch.float32).clone()
            worker.storage.tensor.view(torch.float32).copy_(before)
            assert graphs.bucket_of(plan) == bucket
            found = graphs.replay(plan, bucket)
            assert torch.equal(found, expected)
            assert found.shape == (rows, SPEC.hidden)
            assert torch.equal(worker.storage.tensor.view(torch.float32)[:NUM_BLOCKS], after[:NUM_BLOCKS])


@pytest.mark.parametrize(("rows", "bucket"), [(1, 8), (3, 4), (5, 8)])
def test_padded_rows_write_into_the_scratch_block_alone(loaded, rows, bucket):
    worker = open_worker(loaded, RerunRecorder())
    graphs, plan = worker.runner.graphs, decode_plan(rows)
    kv = random_kv(worker)
    with torch.inference_mode():
        before = kv.clone()
        graphs.capture(bucket)
        assert torch.equal(kv[:NUM_BLOCKS], before[:NUM_BLOCKS])  # recording runs padded rows only
        assert not torch.equal(kv[NUM_BLOCKS], before[NUM_BLOCKS])
        before = kv.clone()
        graphs.replay(plan, bucket)
    changed = {int(block) for block in (kv != before).any(dim=1).nonzero()[:, 0]}
    written = {int(plan.block_tables[row, plan.starts[row] // 16]) for row in range(rows)}
    assert changed - {NUM_BLOCKS} == written


def test_the_padded_step_is_the_unpadded_one_up_to_rounding(loaded):
    worker = open_worker(loaded, RerunRecorder())
    graphs, plan = worker.runner.graphs, decode_plan(5)
    random_kv(worker)
    with torch.inference_mode():
        padded = graphs.padded(plan, 8).clone()
        eager = worker.runner._pass.eager(plan, worker.runner._inputs.fill(plan))
    torch.testing.assert_close(padded, eager, rtol=1e-5, atol=1e-5)


def generate(worker, temperature=0.0):
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(SPEC.vocab) for _ in range(rng.randrange(1, 40))) for _ in range(7)]
    from penstock.workers.protocol import GenerateRequest

    requests = [
        GenerateRequest(f"r{i}", prompt, SamplingParams(max_tokens=4 + i, temperature=temperature, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    return [output.tokens for output in worker.generate(requests)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_with_recorded_steps_gives_the_same_tokens(loaded, temperature):
    with open_worker(loaded) as plain:
        expected = generate(plain, temperature)
    recorder = RerunRecorder()
    with open_worker(loaded, recorder) as worker:
        assert generate(worker, temperature) == expected  # eager: nothing was idle yet
        while worker.runner.use_idle_time():
            pass
        assert worker.runner.graphs.buckets == {1, 2, 4, 8}
        worker.cache.reset() if hasattr(worker.cache, "reset") else None
        assert generate(worker, temperature) == expected
        assert sum(each.replays for each in recorder.recordings) > 5


def test_nothing_is_recorded_before_a_step_was_served(loaded):
    with open_worker(loaded, RerunRecorder()) as worker:
        assert not worker.runner.use_idle_time()
        worker.greedy([(1, 2, 3)], 3)
        assert worker.runner.use_idle_time()
        assert worker.runner.graphs.buckets == {1}  # what traffic used, and no other
        assert not worker.runner.use_idle_time()


def test_the_hottest_is_recorded_first(loaded):
    with open_worker(loaded, RerunRecorder()) as worker:
        graphs = worker.runner.graphs
        for _ in range(3):
            graphs.saw(2, 0.01, replayed=False)
        for _ in range(9):
            graphs.saw(8, 0.01, replayed=False)
        order = []
        while worker.runner.use_idle_time():
            order += [bucket for bucket in sorted(graphs.buckets) if bucket not in order]
        assert order == [8, 2]


def test_under_load_without_a_pause_a_bucket_is_recorded_in_between(loaded):
    with open_worker(loaded, RerunRecorder()) as worker:
        graphs = worker.runner.graphs
        graphs.traffic.captured(1, 0.0)
        with torch.inference_mode():
            for _ in range(1000):
                graphs.saw(4, 0.01, replayed=False)
        assert graphs.buckets == {4}


def test_former_traffic_is_recorded_again(loaded):
    from penstock.workers.graphs.traffic import BucketFigures

    class Keeper:
        def __init__(self):
            self.figures = {4: BucketFigures(50, 0.01, 0.002), 8: BucketFigures(2, 0.01, None)}

        def keep(self, figures):
            self.kept = dict(figures)

    keeper = Keeper()
    with open_worker(loaded, RerunRecorder()) as worker:
        worker.runner.attach(worker.storage, keeper)
        assert not worker.runner.use_idle_time()  # the first token comes first
        worker.greedy([(1, 2, 3)], 2)
        assert worker.runner.use_idle_time()
        assert worker.runner.graphs.buckets == {4}
        while worker.runner.use_idle_time():
            pass
        assert keeper.kept[4].steps == 50
        assert keeper.kept[1].steps == 1


def test_a_failing_recording_is_said_once_and_steps_stay_eager(loaded, caplog):
    with open_worker(loaded) as plain:
        expected = generate(plain)
    with open_worker(loaded, RerunRecorder(failing=True)) as worker:
        assert generate(worker) == expected
        while worker.runner.use_idle_time():
            pass
        graphs = worker.runner.graphs
        with torch.inference_mode():
            for bucket in (1, 2, 4, 8):
                assert not graphs.capture(bucket)
        assert graphs.buckets == frozenset()
        assert [record.levelname for record in caplog.records if "cannot be captured" in record.message] == ["WARNING"]
        assert generate(worker) == expected


@pytest.mark.parametrize("change", ["prefill", "unsampled", "embedded", "too many"])
def test_steps_that_do_more_than_decode_have_no_bucket(loaded, change):
    graphs = open_worker(loaded, RerunRecorder()).runner.graphs
    plan = decode_plan(4)
    assert graphs.bucket_of(plan) == 4
    changes = {
        "prefill": {"num_decode": 3},
        "unsampled": {"sample_rows": plan.sample_rows[:3]},
        "embedded": {"embed_rows": np.array([1], np.int32)},
        "too many": {"starts": np.zeros(9, np.int32), "sample_rows": np.arange(9), "num_decode": 9},
    }
    plan = dataclasses.replace(plan, **changes[change])
    assert graphs.bucket_of(plan) is None
    assert graphs.replay(plan, graphs.bucket_of(plan)) is None


def test_host_storage_is_served_without_recordings(loaded):
    runner = ModelRunner(dataclasses.replace(loaded._parts, recorder=RerunRecorder()))
    with InProcessWorker(runner, num_blocks=NUM_BLOCKS, scheduler=SCHEDULER) as worker:
        worker.greedy([(1, 2, 3)], 2)
        assert runner.graphs is None
        assert not runner.use_idle_time()
