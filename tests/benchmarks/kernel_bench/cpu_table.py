"""The CPU's table: every operation of the backends that run here, at the shapes of a Qwen3 decoder of 34 M parameters.

Figures are medians in microseconds per backend, and for the products and the attention the share of what a plain copy
of their bytes would take on this machine in the same run. Every result is compared with the reference's first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from penstock.kernels import dispatch
from penstock.kernels.ragged import RaggedBatch

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH, LAYERS, SLOTS, VOCAB = 512, 8, 4, 64, 1536, 8, 16, 8192
Call = Callable[[dispatch.Backend], object]


def backends(dtype: torch.dtype) -> tuple[dispatch.Backend, ...]:
    """The installed ones that this dtype can be given to, the reference last."""
    chosen = dispatch.choose("cpu", dtype)
    return tuple({each.name: each for each in (chosen, dispatch.CPU, dispatch.REFERENCE)}.values())


def cases(tokens: int, context: int, dtype: torch.dtype) -> dict[str, Call]:
    """Operation name -> call on a backend."""
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    heads, cos, sin = torch.randn(tokens, HEADS + KV_HEADS, DIM), *torch.randn(2, tokens, DIM // 2)
    gate_up = torch.randn(tokens, 2 * WIDTH).to(dtype)
    width = -(-context // SLOTS)
    kv = torch.randn(tokens * width, LAYERS, 2, KV_HEADS, SLOTS, DIM).to(dtype)
    tables = np.random.default_rng(0).permutation(tokens * width).astype(np.int32).reshape(tokens, width)
    starts, offsets = np.full(tokens, context - 1, np.int32), np.arange(tokens + 1, dtype=np.int32)
    batch = RaggedBatch(starts, offsets, tables)
    plans = {backend.name: backend.plan_attention(kv, batch) for backend in backends(dtype)}
    q, new = torch.randn(tokens, HEADS, DIM).to(dtype), torch.randn(tokens, 2, KV_HEADS, DIM).to(dtype)
    pairs = torch.tensor([[0, 1], [2, 3]])
    return {
        "rms_norm": lambda b: b.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda b: b.add_rms_norm(x, x, weight, 1e-6),
        "rotary": lambda b: b.rotary(heads, cos, sin),
        "silu_and_mul": lambda b: b.silu_and_mul(gate_up),
        "gelu_and_mul": lambda b: b.gelu_and_mul(gate_up),
        "gelu_erf_and_mul": lambda b: b.gelu_erf_and_mul(gate_up),
        "write_kv": lambda b: (b.write_kv(kv, 1, new, plans[b.name]), kv[:, 1])[1],
        "copy_blocks": lambda b: (b.copy_blocks(kv, pairs), kv[:4])[1],
        "plan_attention": lambda b: b.paged_attention(q, kv, 0, b.plan_attention(kv, batch), 0.125),
        "paged_attention": lambda b: b.paged_attention(q, kv, 0, plans[b.name], 0.125),
        "window_attention": lambda b: b.paged_attention(q, kv, 0, plans[b.name], 0.125, window=64),
        "capped_attention": lambda b: b.paged_attention(q, kv, 0, plans[b.name], 0.125, soft_cap=50.0),
        **_latent_cases(batch, tokens * width, dtype),
        **_matrix_cases(x, dtype),
        **_sampling_cases(),
    }


def _latent_cases(batch: RaggedBatch, blocks: int, dtype: torch.dtype) -> dict[str, Call]:
    """At DeepSeek-V2-Lite's widths."""
    kv = torch.randn(blocks, 1, 1, 1, SLOTS, 576).to(dtype)
    q = torch.randn(batch.num_tokens, 16, 576).to(dtype)
    plans = {backend.name: backend.plan_attention(kv, batch) for backend in backends(dtype)}
    return {"latent_attention": lambda b: b.latent_attention(q, kv, 0, plans[b.name], 576**-0.5, 512)}


def _matrix_cases(x: torch.Tensor, dtype: torch.dtype) -> dict[str, Call]:
    matrix = torch.randn(2 * WIDTH, HIDDEN).to(dtype)
    packed = {backend.name: backend.pack_weight(matrix.clone(), None) for backend in backends(dtype)}
    return {
        "pack_weight": lambda b: b.linear(x, b.pack_weight(matrix.clone(), None)),
        "linear": lambda b: b.linear(x, packed[b.name]),
    }


def _sampling_cases() -> dict[str, Call]:
    seed, other = torch.arange(16384), torch.zeros(16384, dtype=torch.int64)
    counter, key = torch.randint(0, 2**32, (1024, 4)), torch.randint(0, 2**32, (1024, 2))
    rows = 2
    logits = 3 * torch.randn(rows, VOCAB)
    zeros = torch.zeros(rows, dtype=torch.int64)
    columns = (
        torch.ones(rows),
        zeros + 40,
        torch.full((rows,), 0.95, dtype=torch.float64),
        torch.zeros(rows),
        torch.arange(rows),
        zeros,
        zeros,
    )
    return {
        "philox": lambda b: b.philox(counter, key),
        "gumbel": lambda b: b.gumbel(seed, other, other, other),
        "sample_tokens": lambda b: b.sample_tokens(logits, *columns),
    }


def check(call: Call, backend: dispatch.Backend) -> None:
    """Raise AssertionError where the fast and the reference result differ by more than rounding."""
    ours, truth = call(backend), call(dispatch.REFERENCE)
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
    return median(times) * 1e6


def table(tokens: int, context: int, dtype: torch.dtype, repeats: int = 60) -> dict[str, object]:
    """{operation_us: {backend: median}} of all but the reference, and two operations' share of a copy."""
    figures: dict[str, object] = {}
    timed = backends(dtype)[:-1]
    with torch.inference_mode():
        for name, call in cases(tokens, context, dtype).items():
            found = {}
            for backend in timed:
                check(call, backend)
                found[backend.name] = round(median_us(lambda c=call, b=backend: c(b), repeats), 1)  # type: ignore[misc]
            figures[f"{name}_us"] = found
        moved = {
            "linear": 2 * WIDTH * HIDDEN * dtype.itemsize,
            "paged_attention": tokens * context * 2 * KV_HEADS * DIM * dtype.itemsize,
        }
        for name, size in moved.items():
            source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
            copy_us = median_us(lambda s=source, t=target: t.copy_(s), repeats)  # type: ignore[misc]
            ours = figures[f"{name}_us"]
            fastest = min(ours.values()) if isinstance(ours, dict) else 0.0
            figures[f"{name}_share_of_copy"] = round(copy_us / fastest, 3)
    return figures
