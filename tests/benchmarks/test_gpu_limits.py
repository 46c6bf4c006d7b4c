"""The limit formulas against figures worked out elsewhere, and against sums by hand."""

import random

import pytest
import torch
from benchmarks.gpu_limits import (
    ModelSize,
    Rates,
    decode_step_s,
    measure_rates,
    overlapped_tokens_s,
    prefill_s,
    workload_s,
)
from benchmarks.gpu_models import MODELS, size_of
from benchmarks.gpu_rows import workloads

H100 = Rates(matrix=790e12, read=3.35e12, copy=3.0e12)  # a measured matrix rate and the data sheet's reads
LLAMA = size_of(MODELS["llama-3.1-8b"])
SMALL = ModelSize(layers=2, hidden=4, query_heads=2, head_dim=2, vocab=10, dense=100, kv_token_bytes=16, weight_bytes=2)


def test_sizes_of_known_models():
    assert LLAMA.kv_token_bytes == 131072
    assert size_of(MODELS["qwen3-8b"]).kv_token_bytes == 147456
    assert size_of(MODELS["qwen3-0.6b"]).kv_token_bytes == 114688
    assert LLAMA.bytes_read(1) == pytest.approx(15.0e9, rel=0.01)
    assert size_of(MODELS["qwen3-0.6b"]).bytes_read(1) == pytest.approx(1.19e9, rel=0.01)
    moe = size_of(MODELS["qwen3-30b-a3b"])
    assert moe.active == pytest.approx(3.0e9, rel=0.05)
    assert (moe.dense + moe.layers * moe.experts * moe.expert) == pytest.approx(30.2e9, rel=0.02)
    assert moe.bytes_read(1) == pytest.approx(2 * moe.active)
    assert moe.bytes_read(1e9) == pytest.approx(2 * (moe.dense + moe.layers * moe.experts * moe.expert))


def test_throughput_if_all_were_overlapped():
    llama_70b = ModelSize(80, 8192, 64, 128, 32000, dense=70_000_000_000, kv_token_bytes=1)
    rates = Rates(260e12, 1.0, 1.0)
    assert int(overlapped_tokens_s(llama_70b, rates)) == 1857
    assert overlapped_tokens_s(LLAMA, H100) == pytest.approx(52.6e3, rel=0.01)


@pytest.mark.parametrize(
    ("model", "name", "tokens_s"),
    [
        ("llama-3.1-8b", "1024/512", 8242),
        ("llama-3.1-8b", "1024/128", 4493),
        ("llama-3.1-8b", "256 uniform 100-1024", 11300),
        ("qwen3-8b", "256 uniform 100-1024", 10700),
        ("qwen3-0.6b", "256 uniform 100-1024", 28600),
    ],
)
def test_sequential_limits_of_known_workloads(model, name, tokens_s):
    workload = {**workloads(toy=False), "1024/128": [(1024, 128)] * 128}[name]
    outputs = sum(output for _, output in workload)
    assert outputs / workload_s(size_of(MODELS[model]), H100, workload) == pytest.approx(tokens_s, rel=0.01)


def test_the_uniform_workload_is_the_known_one():
    lengths = workloads(toy=False)["256 uniform 100-1024"]
    assert len(lengths) == 256
    assert (sum(tokens for tokens, _ in lengths), sum(output for _, output in lengths)) == (142_827, 133_966)


def test_sums_by_hand():
    rates = Rates(matrix=1000.0, read=100.0, copy=1.0)
    assert decode_step_s(SMALL, rates, [5, 6]) == pytest.approx(max(2 * 100 * 2 / 1000, 200 / 100) + 11 * 16 / 100)
    assert decode_step_s(SMALL, rates, [0] * 100) == pytest.approx(2 * 100 * 100 / 1000)
    products = 2 * (100 - 40) * 8 + 2 * 40
    assert prefill_s(SMALL, rates, 8) == pytest.approx((products + 2 * 2 * 2 * 2 * 64 / 0.75) / 1000)
    steps = decode_step_s(SMALL, rates, [3, 5]) + decode_step_s(SMALL, rates, [6])
    whole = prefill_s(SMALL, rates, 2) + prefill_s(SMALL, rates, 4) + steps
    assert workload_s(SMALL, rates, [(2, 2), (4, 3)]) == pytest.approx(whole)
    assert workload_s(SMALL, rates, []) == 0


def test_more_work_takes_longer():
    rng = random.Random(1)
    lengths = [(rng.randint(1, 50), rng.randint(2, 20)) for _ in range(6)]
    least = workload_s(LLAMA, H100, lengths)
    assert workload_s(LLAMA, H100, [*lengths, (5, 5)]) > least
    assert workload_s(LLAMA, H100, [(tokens, output + 1) for tokens, output in lengths]) > least


def test_rates_of_this_machine():
    rates = measure_rates(torch.device("cpu"), size=32, num_bytes=1 << 14)
    assert min(rates.matrix, rates.read, rates.copy) > 0
