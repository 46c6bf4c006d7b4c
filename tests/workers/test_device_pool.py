"""The pool of a GPU worker, on the CPU with told memory: profiled, remembered, refused; and the record it leaves."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.in_process import load_runner
from fakes.rerun_recorder import RerunRecorder

from penstock.workers.device_pool import PoolSize, PoolWish, RecordKeeper, open_pool, profile, record_key
from penstock.workers.errors import ConfigError
from penstock.workers.graphs.record import read_record
from penstock.workers.graphs.traffic import BucketFigures
from penstock.workers.memory_profile import blocks_of, largest_plan, measure
from penstock.workers.runner import ModelRunner
from penstock.workers.settings import KVSettings
from penstock.workers.step_inputs import StepLimits

SPEC = CheckpointSpec("qwen3", 4, 2, 32)
MIB = 1 << 20


@dataclasses.dataclass
class ToldMemory:
    """A device of 100 MiB: 10 MiB stay in tensors beside what the test adds, a step takes 4 MiB."""

    total: int = 100 * MIB
    free: int = 80 * MIB
    allocated: int = 10 * MIB
    peak: int = 14 * MIB
    resets: int = 0

    def reset_peak(self):
        self.resets += 1


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)


def make_runner(model_dir, recorder=None, **limits):
    given = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}
    loaded = load_runner(model_dir, **given)
    return ModelRunner(dataclasses.replace(loaded._parts, recorder=recorder))


def wish(folder="", **kv):
    return PoolWish(KVSettings(**kv), needed=4, record_dir=str(folder))


@pytest.mark.parametrize(
    "limits", [StepLimits(8, 32, 4), StepLimits(8, 8, 4), StepLimits(4, 1000, 4), StepLimits(1, 1, 1)]
)
def test_the_largest_plan_fills_the_limits(limits):
    plan = largest_plan(limits, 16)
    longest = limits.table_width * 16
    assert len(plan.starts) == min(limits.max_rows, limits.max_tokens)
    assert plan.num_tokens == min(limits.max_tokens, limits.max_rows * longest)
    counts = np.diff(plan.offsets)
    assert counts.min() >= 1
    assert counts.max() <= longest
    used = np.concatenate([plan.block_tables[row, : -(-count // 16)] for row, count in enumerate(counts)])
    assert sorted(used) == list(range(blocks_of(plan, 16)))


def test_what_a_step_takes():
    runs = []
    use = measure(lambda: runs.append(1), ToldMemory(), 2 * MIB)
    assert len(runs) == 2  # the first one warms up
    assert (use.total, use.weights, use.activations, use.foreign) == (100 * MIB, 8 * MIB, 4 * MIB, 10 * MIB)


@pytest.mark.parametrize("recorder", [None, RerunRecorder()])
def test_a_pool_is_profiled_and_serves(model_dir, recorder):
    runner = make_runner(model_dir, recorder)
    memory = ToldMemory()
    size = profile(runner, wish(gpu_memory_utilization=0.5), memory)
    assert memory.resets == 2
    extra = 4 * MIB * 8 // 32 if recorder else 0  # recorded steps of at most 8 of 32 tokens
    assert size.step_bytes == 4 * MIB + extra
    scaffold = (blocks_of(largest_plan(runner.limits, 16), 16) + 1) * runner.layout.block_bytes
    left = 50 * MIB - (10 * MIB - scaffold) - size.step_bytes
    assert size.num_blocks == left // runner.layout.block_bytes - 1
    storage = open_pool(runner, wish(num_blocks=9), memory)
    assert storage.num_blocks == 9
    assert len(runner.run(largest_plan(StepLimits(2, 20, 4), 16)).token_ids) == 2
    storage.close()


def test_too_little_memory(model_dir):
    runner = make_runner(model_dir)
    with pytest.raises(ConfigError, match="one sequence of max_model_len needs 4"):
        open_pool(runner, wish(gpu_memory_utilization=0.1), ToldMemory())
    with pytest.raises(ConfigError, match="attach first"):
        runner.run(largest_plan(StepLimits(1, 1, 1), 16))  # nothing of the profile stays


def test_a_step_that_does_not_fit(model_dir, monkeypatch):
    runner = make_runner(model_dir)

    def burst(plan):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(runner, "run", burst)
    with pytest.raises(ConfigError, match="a step of 32 tokens does not fit") as caught:
        profile(runner, wish(), ToldMemory())
    assert caught.value.key == "scheduler.max_num_batched_tokens"


def test_a_restart_takes_blocks_and_traffic_from_the_record(model_dir, tmp_path, monkeypatch):
    runner = make_runner(model_dir, RerunRecorder())
    first = open_pool(runner, wish(tmp_path, gpu_memory_utilization=0.5), ToldMemory())
    blocks = first.num_blocks
    runner._keeper.keep({4: BucketFigures(7.0, 0.01, 0.002)})
    again = make_runner(model_dir, RerunRecorder())
    memory = ToldMemory()
    storage = open_pool(again, wish(tmp_path, gpu_memory_utilization=0.5), memory)
    assert (storage.num_blocks, memory.resets) == (blocks, 0)  # no step was run for it
    assert again.graphs.traffic.figures[4].steps == 7
    tight = ToldMemory(free=30 * MIB)
    fewer = open_pool(again, wish(tmp_path, gpu_memory_utilization=0.5), tight)
    assert (fewer.num_blocks < blocks, tight.resets) == (True, 2)  # it did not fit any more, so it was found out anew
    other = ToldMemory()
    open_pool(again, wish(tmp_path, gpu_memory_utilization=0.4), other)
    assert other.resets == 2  # another share: the record is stale


def test_the_record_is_kept_seldom_and_only_when_it_changed(model_dir, tmp_path):
    runner, now = make_runner(model_dir), [0.0]
    key = record_key(runner, KVSettings())
    keeper = RecordKeeper(str(tmp_path), key, PoolSize(5, 6), None, lambda: now[0])

    def kept():
        record = read_record(tmp_path, key)
        return None if record is None else record.traffic[1].steps

    keeper.keep({1: BucketFigures(1.0)})
    assert kept() == 1
    now[0] = 29.0
    keeper.keep({1: BucketFigures(2.0)})
    assert kept() == 1
    now[0] = 31.0
    keeper.keep({1: BucketFigures(2.0)})
    assert kept() == 2
    RecordKeeper("", key, PoolSize(5, 6), None, lambda: 99.0).keep({1: BucketFigures(9.0)})
    assert kept() == 2


def test_ten_starts_have_one_layout(model_dir):
    keys = {record_key(make_runner(model_dir, RerunRecorder()), KVSettings()) for _ in range(10)}
    assert len(keys) == 1
    assert record_key(make_runner(model_dir), KVSettings()) not in keys  # without recordings there is a buffer less
    assert record_key(make_runner(model_dir, RerunRecorder(), max_num_seqs=9), KVSettings()) not in keys
