"""Speed-of-light bounds against calculations by hand, and the algebra of the score."""

import pytest
from kernel_bench import sol
from kernel_bench.sol import Cost, Rates


def test_gemm():
    # 2 x 3 x 4 multiply-adds; x 2 x 4, w 3 x 4, y 2 x 3 numbers of two bytes
    assert sol.gemm(2, 3, 4) == Cost(48, 2 * 4 * 2 + 3 * 4 * 2, 2 * 3 * 2)
    assert sol.gemm(1, 4096, 4096, w_bytes=0.5).read_bytes == 4096 * 2 + 4096 * 4096 / 2


def test_decode_attention_reads_the_kv_that_is_there():
    # 64 rows of 8,191 stored and 1 new token, 8 kv heads of 128, bf16: 2 GiB of keys and values
    cost = sol.attention([8191] * 64, [1] * 64, heads=32, kv_heads=8, dim=128)
    assert cost.read_bytes == 64 * 8192 * 2 * 8 * 128 * 2 + 64 * 32 * 128 * 2
    assert cost.flops == 4 * 64 * 8192 * 32 * 128
    assert cost.written_bytes == 64 * 32 * 128 * 2


def test_causal_prefill_counts_half_the_square():
    assert sol.attention([0], [4], 1, 1, 1).flops == 4 * (1 + 2 + 3 + 4)
    assert sol.attention([10, 0], [2, 1], 1, 1, 1).flops == 4 * (11 + 12 + 1)


def test_a_shared_prefix_is_read_once():
    shared = sol.shared_attention(256, 16384, 128, 32, 8, 128)
    apart = sol.attention([16384 + 127] * 256, [1] * 256, 32, 8, 128)
    assert shared.flops == apart.flops
    per_token = 2 * 8 * 128 * 2
    assert apart.read_bytes - shared.read_bytes == 255 * 16384 * per_token


def test_elementwise():
    assert sol.rms_norm(3, 5, residual=False) == Cost(0, (15 + 5) * 2, 15 * 2)
    assert sol.rms_norm(3, 5, residual=True) == Cost(0, (30 + 5) * 2, 30 * 2)
    assert sol.gated(3, 5) == Cost(0, 2 * 15 * 2, 15 * 2)
    assert sol.rotary(1, 2, 4) == Cost(0, 8 * 2 + 2 * 2 * 4, 8 * 2)
    assert sol.sampling(2, 10).read_bytes == 80


def test_swiglu_block_is_the_sum_of_its_parts():
    # 7 tokens, hidden 4, width 6: 3 products of 2 x 7 x 4 x 6
    whole = sol.gemm(7, 12, 4) + sol.gated(7, 6) + sol.gemm(7, 4, 6)
    assert whole.flops == 2 * 7 * 12 * 4 + 2 * 7 * 4 * 6


def test_moe_reads_only_what_is_hit():
    assert sol.moe(1, 8, 8, 2048, 768).read_bytes == 8 * 3 * 2048 * 768 * 2 + 2048 * 2
    assert sol.moe(4, 2, 5, 16, 8).flops == 2 * 4 * 2 * 3 * 16 * 8
    assert sol.hit_experts(128, 8, 1) == pytest.approx(8)
    assert sol.hit_experts(128, 8, 16384) == pytest.approx(128)


def test_lora():
    # 2 tokens, 2 adapters of rank 4, 8 inputs, 16 outputs
    cost = sol.lora(2, 2, 4, 8, 16)
    assert cost == Cost(2 * 2 * 4 * 24, 2 * (2 * 4 * 24 + 2 * 24), 2 * 2 * 16)


def test_seconds_take_the_larger_of_arithmetic_and_traffic():
    rates = Rates(read=4.0, copy=2.0, bf16_flops=10.0)
    assert rates.seconds(Cost(100, 4, 0)) == 10
    assert rates.seconds(Cost(100, 4, 0), speedup=2) == 5
    assert rates.seconds(Cost(1, 40, 0)) == 10  # a pure read
    assert rates.seconds(Cost(1, 20, 20)) == 20  # a copy: 40 bytes moved at 2
    assert rates.seconds(Cost(0, 0, 0)) == 0
    between = rates.seconds(Cost(0, 30, 10))
    assert 10 < between < 20


def test_score():
    assert sol.score(2.0, 1.0, 2.0) == 0.5
    assert sol.score(1.0, 1.0, 2.0) == 1.0
    values = [sol.score(seconds / 10, 1.0, 2.0) for seconds in range(10, 60)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="one of them is wrong"):
        sol.score(1.0, 2.0, 1.5)


def test_faster_than_light_is_suspicious():
    assert sol.suspicious(0.9, 1.0)
    assert not sol.suspicious(0.96, 1.0)
