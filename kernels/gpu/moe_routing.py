"""The choice of experts on the GPU: one program per token scores, picks and weighs.

Launched by `moe`. Legend: T tokens, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.routing import Routing


@triton.jit
def lowest_best(merit, barred, index, LAST: tl.constexpr):
    """Where the largest merit among those not barred is; the lowest index of equals, even if all are -inf."""
    best = tl.max(tl.where(barred != 0, float("-inf"), merit), axis=0)
    return tl.min(tl.where((merit == best) & (barred == 0), index, LAST), axis=0)


@triton.jit
def group_merits(merit, e, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_E: tl.constexpr, TWO: tl.constexpr):
    """[BLOCK_E] of which the first GROUPS hold each group's best merit, or the sum of its best two."""
    best_of = tl.full((BLOCK_E,), float("-inf"), dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        outside = e // MEMBERS != group
        best = tl.max(tl.where(outside, float("-inf"), merit), axis=0)
        if TWO:
            first = lowest_best(merit, outside, e, BLOCK_E)
            best += tl.max(tl.where(outside | (e == first), float("-inf"), merit), axis=0)
        best_of = tl.where(e == group, best, best_of)
    return best_of


@triton.jit
def route_kernel(
    logits,
    bias,
    ids,
    weights,
    E,
    stride,
    scaling,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """ids[t, j] and weights[t, j] of the TOP_K experts of token t."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    logit = tl.load(logits + t * stride + e, mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logit))
    else:
        powers = tl.exp(logit - tl.max(tl.where(logit == logit, logit, float("-inf")), axis=0))
        scores = powers / tl.sum(powers, axis=0)
    merit = logit
    if HAS_BIAS:
        merit = scores + tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    merit = tl.where(merit == merit, merit, float("-inf"))
    barred = tl.where(inside, 0, 1)
    if GROUPS > 0:
        best_of = group_merits(tl.where(inside, merit, float("-inf")), e, GROUPS, MEMBERS, BLOCK_E, HAS_BIAS)
        lost = tl.where(e < GROUPS, 0, 1)
        allowed = tl.zeros((BLOCK_E,), dtype=tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            group = lowest_best(best_of, lost, e, BLOCK_E)
            lost = tl.where(e == group, 1, lost)
            allowed = tl.where(e // MEMBERS == group, 1, allowed)
        barred = tl.where(allowed > 0, barred, 1)

    j = tl.arange(0, BLOCK_K)
    picks = tl.zeros((BLOCK_K,), dtype=tl.int32)
    shares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        pick = lowest_best(merit, barred, e, BLOCK_E)
        barred = tl.where(e == pick, 1, barred)
        picks = tl.where(j == place, pick, picks)
        shares = tl.where(j == place, tl.sum(tl.where(e == pick, scores, 0.0), axis=0), shares)
    if RENORMALIZE:
        total = tl.sum(shares, axis=0)
        shares = shares / tl.where(total == 0.0, 1.0, total)
    shares = shares * scaling
    strange = tl.max(tl.where(inside & (logit != logit), 1, 0), axis=0)
    shares = tl.where(strange > 0, float("nan"), shares)
    tl.store(ids + t * TOP_K + j, picks, mask=j < TOP_K)
    tl.store(weights + t * TOP_K + j, shares, mask=j < TOP_K)


def route(
    logits_TE: Tensor, how: Routing, selection_bias: Tensor | None, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See `ops.route_experts`; rows of the logits dense, arguments checked."""
    tokens, experts = logits_TE.shape
    ids = torch.empty(tokens, how.top_k, device=logits_TE.device, dtype=torch.int32)
    weights = torch.empty(tokens, how.top_k, device=logits_TE.device, dtype=torch.float32)
    if tokens:
        route_kernel[(tokens,)](
            logits_TE,
            weights if selection_bias is None else selection_bias.contiguous(),
            ids,
            weights,
            experts,
            logits_TE.stride(0),
            float(scaling),
            TOP_K=how.top_k,
            BLOCK_E=max(triton.next_power_of_2(experts), 32),
            BLOCK_K=triton.next_power_of_2(how.top_k),
            SIGMOID=how.scoring == "sigmoid",
            RENORMALIZE=how.renormalize,
            HAS_BIAS=selection_bias is not None,
            GROUPS=how.groups,
            TOP_GROUPS=how.top_groups,
            MEMBERS=experts // how.groups if how.groups else 1,
            num_warps=1 if experts <= 256 else 4,
        )
    return ids, weights


def _case(name: str, experts: int, *, sigmoid: bool, biased: bool, groups: tuple[int, int], warps: int) -> AotCase:
    count, best = groups
    signature = {"logits": "*fp32", "bias": "*fp32", "ids": "*i32", "weights": "*fp32", "E": "i32", "stride": "i32"}
    signature["scaling"] = "fp32"
    constants = {"TOP_K": 8, "BLOCK_E": experts, "BLOCK_K": 8, "SIGMOID": sigmoid, "RENORMALIZE": True}
    members = experts // count if count else 1
    grouped = {"HAS_BIAS": biased, "GROUPS": count, "TOP_GROUPS": best, "MEMBERS": members}
    aligned = ("logits", "bias", "ids", "weights", "E", "stride")
    return AotCase(name, route_kernel, signature, {**constants, **grouped}, warps, 3, aligned)


AOT_CASES = (
    _case("softmax-e128-k8", 128, sigmoid=False, biased=False, groups=(0, 0), warps=1),
    _case("sigmoid-e256-k8-groups8", 256, sigmoid=True, biased=True, groups=(8, 4), warps=1),
    _case("softmax-e512-k8", 512, sigmoid=False, biased=False, groups=(0, 0), warps=4),
)
