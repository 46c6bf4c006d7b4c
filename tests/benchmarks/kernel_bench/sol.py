"""Speed-of-light bounds: what an operation must at least move and compute, and the time that takes at measured rates.

After SOL-ExecBench (arXiv 2603.19173): bytes are those of weights, inputs and outputs once each (everything between
fused), counted from the workload itself: only the KV that is there, only the experts that are hit. A multiply-add is
two operations. Knows no tensors and no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """`flops` at the matrix rate of the operands' type, `read_bytes` and `written_bytes` of device memory."""

    flops: float
    read_bytes: float
    written_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.read_bytes + other.read_bytes, self.written_bytes + other.written_bytes
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured in the same run. `read` counts bytes read, `copy` bytes read plus written, per second."""

    read: float
    copy: float
    bf16_flops: float

    def seconds(self, cost: Cost, speedup: float = 1.0) -> float:
        """The bound: the larger of arithmetic and traffic. `speedup` is the type's rate over bf16's (2 for 8 bits).

        Traffic goes at the read rate where hardly anything is written and at the copy rate where half of it is.
        """
        moved = cost.read_bytes + cost.written_bytes
        share = min(1.0, 2 * cost.written_bytes / moved) if moved else 0.0
        per_byte = (1 - share) / self.read + share / self.copy
        return max(cost.flops / (self.bf16_flops * speedup), moved * per_byte)


def score(seconds: float, bound: float, baseline: float) -> float:
    """1 at the bound, 1/2 at the baseline. Raises ValueError when the baseline is not above the bound."""
    if baseline <= bound:
        raise ValueError(f"baseline {baseline} is not slower than the bound {bound}: one of them is wrong")
    return 1 / (1 + (seconds - bound) / (baseline - bound))


def suspicious(seconds: float, bound: float) -> bool:
    """Faster than light, with a twentieth of room for the rates' own error: the bound or the timing is wrong."""
    return seconds < 0.95 * bound


def gemm(m: int, n: int, k: int, *, x_bytes: float = 2, w_bytes: float = 2, out_bytes: float = 2) -> Cost:
    """[m, k] x [k, n]; bytes an element, scales of the weight included in `w_bytes`."""
    return Cost(2.0 * m * n * k, m * k * x_bytes + n * k * w_bytes, m * n * out_bytes)


def attention(
    starts: Sequence[int], counts: Sequence[int], heads: int, kv_heads: int, dim: int, *, bytes_each: float = 2
) -> Cost:
    """Causal attention of `counts[i]` new tokens after `starts[i]` stored ones; each row's KV is read once."""
    pairs = sum(count * start + count * (count + 1) / 2 for start, count in zip(starts, counts, strict=True))
    tokens, keys = sum(counts), sum(starts) + sum(counts)
    return Cost(
        4.0 * pairs * heads * dim,
        keys * 2 * kv_heads * dim * bytes_each + tokens * heads * dim * 2,
        tokens * heads * dim * 2,
    )


def latent_attention(rows: int, stored: int, new: int, widths: tuple[int, int, int]) -> Cost:
    """Causal attention of `new` tokens a row after `stored` ones, each row read once; `widths`: heads, row, value."""
    heads, row, value = widths
    pairs, tokens = rows * (new * stored + new * (new + 1) / 2), rows * new
    keys = rows * (stored + new)
    return Cost(2.0 * pairs * heads * (row + value), (keys + tokens * heads) * row * 2, tokens * heads * value * 2)


def shared_attention(rows: int, prefix: int, own: int, heads: int, kv_heads: int, dim: int) -> Cost:
    """Decode of `rows` sequences that share `prefix` stored tokens, read once, and have `own` more each."""
    flops = 4.0 * rows * (prefix + own) * heads * dim
    return Cost(flops, (prefix + rows * own) * 2 * kv_heads * dim * 2 + rows * heads * dim * 2, rows * heads * dim * 2)


def rms_norm(rows: int, width: int, *, residual: bool, bytes_each: float = 2) -> Cost:
    """Reads x, the residual and the weight; writes the norm and the sum."""
    tensors = 2 if residual else 1
    return Cost(0.0, (tensors * rows * width + width) * bytes_each, tensors * rows * width * bytes_each)


def gated(tokens: int, width: int, bytes_each: float = 2) -> Cost:
    """Reads both halves, writes one."""
    return Cost(0.0, 2 * tokens * width * bytes_each, tokens * width * bytes_each)


def rotary(tokens: int, heads: int, dim: int, bytes_each: float = 2) -> Cost:
    """Reads and writes the heads; tables of float32 [tokens, dim / 2] twice."""
    return Cost(0.0, tokens * heads * dim * bytes_each + tokens * dim * 4, tokens * heads * dim * bytes_each)


def sampling(rows: int, vocab: int) -> Cost:
    """Reads float32 logits once."""
    return Cost(0.0, rows * vocab * 4.0, rows * 8.0)


def moe(tokens: int, chosen: int, hit: int, inputs: int, width: int, *, w_bytes: float = 2) -> Cost:
    """Two grouped products of `tokens * chosen` rows; weights of the `hit` experts once."""
    flops = 2.0 * tokens * chosen * 3 * inputs * width
    return Cost(flops, hit * 3 * inputs * width * w_bytes + tokens * inputs * 2, tokens * inputs * 2)


def lora(tokens: int, adapters: int, rank: int, inputs: int, outputs: int) -> Cost:
    """y += x A^T B^T: the distinct adapters once, x read, y read and written."""
    flops = 2.0 * tokens * rank * (inputs + outputs)
    return Cost(flops, 2 * (adapters * rank * (inputs + outputs) + tokens * (inputs + outputs)), 2 * tokens * outputs)


def hit_experts(experts: int, chosen: int, tokens: int) -> float:
    """Experts that at least one of `tokens` chooses, when every choice is as likely: E (1 - (1 - k / E)^T)."""
    return experts * (1 - (1 - chosen / experts) ** tokens)
