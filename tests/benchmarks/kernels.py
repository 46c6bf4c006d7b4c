#!/usr/bin/env python3
"""Time every operation of `penstock.kernels.ops`, after checking it against the reference. Prints one JSON object.

    python tests/benchmarks/kernels.py [--tokens 32] [--context 320] [--dtype bfloat16] [--threads 2]

Shapes are those of a Qwen3 decoder of 34 M parameters. Figures are medians in microseconds, and for the products and
the attention the share of what a plain copy of their bytes would take on this machine in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from penstock.kernels import dispatch
from penstock.kernels.ragged import RaggedBatch

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH, LAYERS, SLOTS = 512, 8, 4, 64, 1536, 8, 16
Call = Callable[[dispatch.Backend], object]


def cases(tokens: int, context: int, dtype: torch.dtype) -> dict[str, Call]:
    """Operation name -> call on a backend."""
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    heads, cos, sin = torch.randn(tokens, HEADS + KV_HEADS, DIM), *torch.randn(2, tokens, DIM // 2)
    gate_up, matrix = torch.randn(tokens, 2 * WIDTH).to(dtype), torch.randn(2 * WIDTH, HIDDEN).to(dtype)
    packed = {backend.name: backend.pack_weight(matrix, None) for backend in (dispatch.CPU, dispatch.REFERENCE)}
    width = -(-context // SLOTS)
    kv = torch.randn(tokens * width, LAYERS, 2, KV_HEADS, SLOTS, DIM).to(dtype)
    tables = np.random.default_rng(0).permutation(tokens * width).astype(np.int32).reshape(tokens, width)
    starts, offsets = np.full(tokens, context - 1, np.int32), np.arange(tokens + 1, dtype=np.int32)
    batch = RaggedBatch(starts, offsets, tables)
    plan = dispatch.CPU.plan_attention(kv, batch)
    q, new = torch.randn(tokens, HEADS, DIM).to(dtype), torch.randn(tokens, 2, KV_HEADS, DIM).to(dtype)
    pairs = torch.tensor([[0, 1], [2, 3]])
    seed, other = torch.arange(16384), torch.zeros(16384, dtype=torch.int64)
    counter, key = torch.randint(0, 2**32, (1024, 4)), torch.randint(0, 2**32, (1024, 2))
    return {
        "rms_norm": lambda b: b.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda b: b.add_rms_norm(x, x, weight, 1e-6),
        "rotary": lambda b: b.rotary(heads, cos, sin),
        "silu_and_mul": lambda b: b.silu_and_mul(gate_up),
        "gelu_and_mul": lambda b: b.gelu_and_mul(gate_up),
        "pack_weight": lambda b: b.linear(x, b.pack_weight(matrix, None)),
        "linear": lambda b: b.linear(x, packed[b.name]),
        "write_kv": lambda b: (b.write_kv(kv, 1, new, plan), kv[:, 1])[1],
        "copy_blocks": lambda b: (b.copy_blocks(kv, pairs), kv[:4])[1],
        "plan_attention": lambda b: b.paged_attention(q, kv, 0, b.plan_attention(kv, batch), 0.125),
        "paged_attention": lambda b: b.paged_attention(q, kv, 0, plan, 0.125),
        "window_attention": lambda b: b.paged_attention(q, kv, 0, plan, 0.125, window=64),
        "capped_attention": lambda b: b.paged_attention(q, kv, 0, plan, 0.125, soft_cap=50.0),
        "philox": lambda b: b.philox(counter, key),
        "gumbel": lambda b: b.gumbel(seed, other, other, other),
    }


def check(call: Call) -> None:
    """Raise AssertionError where the fast and the reference result differ by more than rounding."""
    ours, truth = call(dispatch.CPU), call(dispatch.REFERENCE)
    for left, right in zip(_tensors(ours), _tensors(truth), strict=True):
        torch.testing.assert_close(left, right, atol=0.5 if left.dtype is torch.bfloat16 else 1e-3, rtol=2e-2)


def _tensors(result: object) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def median_us(work: Callable[[], object], repeats: int = 60) -> float:
    """Median duration of `work` after ten warm-ups."""
    for _ in range(10):
        work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=320)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    figures: dict[str, object] = dict(vars(args))
    with torch.inference_mode():
        for name, call in cases(args.tokens, args.context, dtype).items():
            check(call)
            figures[f"{name}_us"] = round(median_us(lambda call=call: call(dispatch.CPU)), 1)  # type: ignore[misc]
        moved = {
            "linear": 2 * WIDTH * HIDDEN * dtype.itemsize,
            "paged_attention": args.tokens * args.context * 2 * KV_HEADS * DIM * dtype.itemsize,
        }
        for name, size in moved.items():
            source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
            copy_us = median_us(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
            figures[f"{name}_share_of_copy"] = round(copy_us / float(str(figures[f"{name}_us"])), 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
