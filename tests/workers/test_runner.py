"""The model runner: layout and revision, storage checks, block copies, and settings that cannot be served."""

import dataclasses
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.in_process import load_runner

from penstock.workers import model_build
from penstock.workers.errors import ConfigError, DeviceError, IntegrityError, ModelError
from penstock.workers.forward_pass import kv_view
from penstock.workers.model_build import build_model_runner
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

SPEC = CheckpointSpec("qwen3", 4, 1, 64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)


def storage(runner, blocks=6):
    return SimpleNamespace(data=np.zeros((blocks, runner.layout.block_bytes), np.uint8))


def plan(tokens, start, blocks, *, sampled=True, copies=()):
    rows = int(sampled)
    columns = {
        "temperature": "f4",
        "top_k": "i4",
        "top_p": "f4",
        "min_p": "f4",
        "seed": "u8",
        "choice": "i4",
        "position": "i4",
    }
    return StepPlan(
        step=1,
        slots=np.zeros(1, np.int32),
        starts=np.array([start], np.int32),
        offsets=np.array([0, len(tokens)], np.int32),
        token_ids=np.array(tokens, np.int32),
        block_tables=np.array([blocks], np.int32),
        sample_rows=np.arange(rows, dtype=np.int32),
        sampling=SamplingBatch(
            **{k: np.zeros(rows, d) for k, d in columns.items()}, logprobs=np.full(rows, -1, np.int32)
        ),
        num_decode=0,
        copies=np.array(copies, np.int32).reshape(-1, 2),
    )


def test_layout(model_dir):
    layout = load_runner(model_dir, max_model_len=128, block_size=8).layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size) == (2, 1, 64, 8)
    assert layout.dtype == "float32"
    assert layout.block_bytes == 2 * 2 * 1 * 64 * 4 * 8


def test_compatibility_tells_weights_and_dtypes_apart(model_dir, tmp_path):
    same = load_runner(model_dir, max_model_len=128)
    assert load_runner(model_dir, max_model_len=64).layout.compatibility == same.layout.compatibility
    other = load_runner(make_checkpoint(tmp_path, dataclasses.replace(SPEC, seed=1)), max_model_len=128)
    assert other.layout.compatibility != same.layout.compatibility
    assert load_runner(model_dir, dtype="bfloat16", max_model_len=128).layout.compatibility != same.layout.compatibility


def test_auto_dtype_is_the_checkpoints(tmp_path):
    directory = make_checkpoint(tmp_path, SPEC, dtype=torch.bfloat16)
    assert load_runner(directory, dtype="auto", max_model_len=64).layout.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("runner", "limits", "key"),
    [
        ({"dtype": "float8"}, {}, "runner.dtype"),
        ({"device": "gpu"}, {}, "runner.device"),
        ({"device": "cuda:63"}, {}, "runner.device"),
        ({}, {"max_model_len": 100_000}, "scheduler.max_model_len"),
    ],
)
def test_settings_that_cannot_be_served(model_dir, runner, limits, key):
    settings = RunnerSettings(model_dir=str(model_dir), **runner)
    limits = {"max_model_len": 64, **limits}
    with pytest.raises(ConfigError) as caught:
        build_model_runner(settings, KVSettings(), SchedulerSettings(**limits))
    assert caught.value.key == key


def test_no_model_directory():
    with pytest.raises(ModelError, match="no such model directory"):
        build_model_runner(RunnerSettings(model_dir="/nonexistent"), KVSettings(), SchedulerSettings())


def test_storage_of_the_wrong_size_and_no_storage(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    with pytest.raises(ConfigError, match="attach first"):
        runner.run(plan([1], 0, [0]))
    with pytest.raises(ConfigError, match="does not hold blocks"):
        runner.attach(SimpleNamespace(data=np.zeros((4, 100), np.uint8)))


def test_a_plan_may_sample_nothing_or_only_copy(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    memory = storage(runner)
    runner.attach(memory)
    assert len(runner.run(plan(list(range(20)), 0, [3, 1], sampled=False)).token_ids) == 0
    view = kv_view(memory.data, runner.layout)
    assert view.shape == (6, 2, 2, 1, 16, 64)
    assert (view[1, :, :, :, 4:] == 0).all()
    assert view[3].any(dim=-1).all()
    runner.run(plan([], 0, [0], sampled=False, copies=[(3, 5)]))
    assert torch.equal(view[5], view[3])


def test_copies_come_before_the_step_and_plans_are_self_contained(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    prompt = np.random.default_rng(0).integers(0, SPEC.vocab, 32).tolist()
    runner.attach(storage(runner))
    expected = runner.run(plan(prompt, 0, [0, 1])).token_ids
    # All but the last token is known; the last block is copied before its last slot is written again.
    assert runner.run(plan(prompt[31:], 31, [0, 4], copies=[(1, 4)])).token_ids == expected


def test_the_calling_thread_gets_the_number_of_threads(model_dir):
    runner = load_runner(model_dir, threads=2, max_model_len=64)
    runner.attach(storage(runner))
    before, seen = torch.get_num_threads(), []

    def work():
        torch.set_num_threads(1)
        runner.run(plan([1, 2], 0, [0]))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [2]
    torch.set_num_threads(before)


def test_vocabulary(model_dir):
    assert load_runner(model_dir, max_model_len=64).vocab_size == SPEC.vocab


def test_a_step_may_be_launched_before_the_last_was_collected(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    plans = [plan([5, 6, 7], 0, [0]), plan([9, 8], 0, [1]), plan([3], 3, [0])]
    runner.attach(storage(runner))
    expected = [runner.run(each).token_ids.tolist() for each in plans]
    runner.attach(storage(runner))
    first, second = runner.launch(plans[0]), runner.launch(plans[1])
    assert runner.collect(first).token_ids.tolist() == expected[0]
    third = runner.launch(plans[2])
    assert [runner.collect(each).token_ids.tolist() for each in (second, third)] == expected[1:]


def test_a_plan_may_name_tokens_by_the_row_that_samples_them(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    runner.attach(storage(runner))
    first = plan([5, 6, 7], 0, [0])
    token = int(runner.run(first).token_ids[0])
    expected = runner.run(plan([token], 3, [0])).token_ids.tolist()
    runner.attach(storage(runner))
    follower = replace(plan([-1], 3, [0]), step=first.step + 1, follows=True)
    waits = [runner.start(first), runner.start(follower)]
    assert waits[0]().token_ids.tolist() == [token]
    assert waits[1]().token_ids.tolist() == expected
    with pytest.raises(IntegrityError, match="whose tokens are not here"):
        runner.start(replace(follower, step=first.step + 5))


def test_what_a_plan_held_may_change_once_the_step_is_launched(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    runner.attach(storage(runner))
    expected = runner.run(plan([5, 6, 7], 0, [0])).token_ids.tolist()
    changing = plan([5, 6, 7], 0, [0])
    launched = runner.launch(changing)
    changing.token_ids[:] = 0
    changing.block_tables[:] = 3
    assert runner.collect(launched).token_ids.tolist() == expected


def test_a_device_that_fails_ends_the_worker(model_dir, monkeypatch):
    runner = load_runner(model_dir, max_model_len=64)
    runner.attach(storage(runner))

    def fail(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(runner, "_sample", fail)
    with pytest.raises(DeviceError, match="illegal memory access"):
        runner.run(plan([1], 0, [0]))


def test_storage_and_weights_on_different_devices(model_dir):
    runner = load_runner(model_dir, max_model_len=64)
    elsewhere = SimpleNamespace(tensor=torch.zeros((4, runner.layout.block_bytes), dtype=torch.uint8, device="meta"))
    with pytest.raises(ConfigError, match="the KV storage is on meta and the weights are on cpu"):
        runner.attach(elsewhere)


def test_other_architectures_need_the_cpu(tmp_path, monkeypatch):
    directory = make_checkpoint(tmp_path, SPEC)
    monkeypatch.setattr(model_build, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(model_build, "check_dtype", lambda device, dtype: None)
    settings = RunnerSettings(model_dir=str(directory), device="cuda", model_impl="transformers")
    with pytest.raises(ConfigError, match="on the CPU only") as caught:
        build_model_runner(settings, KVSettings(), SchedulerSettings(max_model_len=64))
    assert caught.value.key == "runner.device"
