"""What the hardware allows a decoder: step and workload limits out of measured rates, and the measuring of those rates.

Used by `engine_gpu.py`. Formulas: decode step T >= max(2 P B / pi, bytes of weights / beta) + sum of contexts x k /
beta; prefill of n tokens T >= (2 (P - V h) n + 2 V h + 2 L Hq D n^2 / 0.75) / pi; operations one after another. The
other bound, everything overlapped, is NanoFlow's: tokens (prefill and decode) per second = pi / (2 P active).
P: matrix parameters with the head, without the embedding; k: bytes of KV per token; pi, beta: measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ATTENTION_SHARE = 0.75  # of the matrix rate that the best prefill attention reaches
_REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """`matrix` in FLOP/s of bf16 products, `read` and `copy` in bytes/s (a copy counts both ways)."""

    matrix: float
    read: float
    copy: float


@dataclass(frozen=True)
class ModelSize:
    """The numbers of the formulas; for a mixture of experts `experts` of `top_k` lie behind the dense part."""

    layers: int
    hidden: int
    query_heads: int
    head_dim: int
    vocab: int
    dense: int  # matrix parameters outside of experts, head included
    kv_token_bytes: int
    weight_bytes: int = 2  # per parameter
    expert: int = 0  # parameters of one expert of one layer
    experts: int = 0
    top_k: int = 0

    @property
    def active(self) -> int:
        """Matrix parameters that one token meets."""
        return self.dense + self.layers * self.top_k * self.expert

    def bytes_read(self, tokens: float) -> float:
        """Weights read by a step of so many tokens, experts hit at random."""
        hit = self.experts * (1 - (1 - self.top_k / self.experts) ** tokens) if self.experts else 0.0
        return self.weight_bytes * (self.dense + self.layers * hit * self.expert)


def decode_step_s(model: ModelSize, rates: Rates, contexts: Sequence[int]) -> float:
    """Least seconds of a step that decodes one token for each context."""
    weights = max(2 * model.active * len(contexts) / rates.matrix, model.bytes_read(len(contexts)) / rates.read)
    return weights + sum(contexts) * model.kv_token_bytes / rates.read


def prefill_s(model: ModelSize, rates: Rates, tokens: int) -> float:
    """Least seconds to compute a prompt of which one token's logits are wanted."""
    head = model.vocab * model.hidden
    attention = 2 * model.layers * model.query_heads * model.head_dim * tokens**2 / ATTENTION_SHARE
    return (2 * (model.active - head) * tokens + 2 * head + attention) / rates.matrix


def workload_s(model: ModelSize, rates: Rates, workload: Sequence[tuple[int, int]]) -> float:
    """Least seconds for (input, output) lengths served together, operations one after another: the sequential limit."""
    total = sum(prefill_s(model, rates, tokens) for tokens, _ in workload)
    for step in range(1, max((output for _, output in workload), default=0)):
        total += decode_step_s(model, rates, [tokens + step for tokens, output in workload if output > step])
    return total


def overlapped_tokens_s(model: ModelSize, rates: Rates) -> float:
    """Tokens in and out per second if everything but the products were hidden behind them."""
    return rates.matrix / (2 * model.active)


def measure_rates(device: torch.device, *, size: int, num_bytes: int) -> Rates:
    """Rates of this device now: a product of two random `size` x `size` matrices, a sum and a copy of `num_bytes`."""
    matrix = _matrix_rate(device, size)
    data = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    other = torch.empty_like(data)
    read = num_bytes / min(best_s(lambda: data.sum(), device), best_s(lambda: data.max(), device))
    copy = 2 * num_bytes / best_s(lambda: other.copy_(data), device)
    return Rates(matrix, max(read, copy), copy)


def _matrix_rate(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b, device)


def best_s(work: Callable[[], object], device: torch.device) -> float:
    """Least of several timings after a warm-up, with the device empty before each."""
    work()
    times = []
    for _ in range(_REPEATS):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
