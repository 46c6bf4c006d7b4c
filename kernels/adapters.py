"""What the multi-adapter operations demand, said once, and the part of a plan that every backend shares.

Called by the `lora` modules of every backend. Legend: T tokens, K inputs, M outputs, R rank, S adapter slots.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import expect
from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import LoraPlan

MOST_RANKS = 256


def sorted_segments(slots: Tensor) -> tuple[NDArray[np.int64], tuple[tuple[int, int, int], ...]]:
    """Tokens that have an adapter in stable order of its slot, and their segments (slot, start, end)."""
    expect.dtype("plan_lora", "slots", slots, *expect.INTEGERS)
    expect.shape("plan_lora", "slots", slots, None)
    host = slots.cpu().numpy().astype(np.int64)
    if host.size and host.min() < -1:
        raise KernelInputError("plan_lora", "slots", f"{int(host.min())}; expected -1 (none) or a slot")
    order = np.argsort(host, kind="stable")
    order = order[host[order] >= 0]
    used, starts = np.unique(host[order], return_index=True)
    ends = np.append(starts[1:], order.size)[: used.size]
    return order, tuple((int(slot), int(start), int(end)) for slot, start, end in zip(used, starts, ends, strict=True))


def slots_needed(segments: tuple[tuple[int, int, int], ...]) -> int:
    """How many slots the weights must have to hold every adapter of these segments."""
    return segments[-1][0] + 1 if segments else 0


def check_lora(y_TM: Tensor, x_TK: Tensor, a_SRK: Tensor, b_SMR: Tensor, scales_S: Tensor, plan: LoraPlan) -> None:
    """Raises KernelInputError where these arguments cannot be served; reads no values."""
    op = "lora_add"
    expect.dtype(op, "x", x_TK, *expect.FLOATS)
    expect.shape(op, "x", x_TK, plan.num_tokens, None)
    expect.shape(op, "a", a_SRK, None, None, x_TK.shape[1])
    slots, rank, _ = a_SRK.shape
    expect.shape(op, "y", y_TM, plan.num_tokens, None)
    expect.shape(op, "b", b_SMR, slots, y_TM.shape[1], rank)
    expect.shape(op, "scales", scales_S, slots)
    expect.dtype(op, "scales", scales_S, torch.float32, torch.float64)
    for name, tensor in (("y", y_TM), ("a", a_SRK), ("b", b_SMR)):
        expect.dtype(op, name, tensor, x_TK.dtype)
        expect.dense_rows(op, name, tensor)
    expect.dense_rows(op, "x", x_TK)
    for name, tensor in (("y", y_TM), ("a", a_SRK), ("b", b_SMR), ("scales", scales_S)):
        expect.device(op, name, tensor, x_TK)
    if not 1 <= rank <= MOST_RANKS:
        raise KernelInputError(op, "a", f"rank {rank}; expected 1 to {MOST_RANKS}")
    if plan.num_slots > slots:
        raise KernelInputError(op, "plan", f"uses slot {plan.num_slots - 1}; the weights hold {slots}")
