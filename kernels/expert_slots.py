"""Single experts in and out of packed experts, so that a rank can change which ones it holds between two steps.

Called by `workers/parallel/expert_weights.py`. Works on what any backend's `pack_experts` made; knows only tensors.
Legend: E experts, K inputs, F width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.linear import unpack_panels
from penstock.kernels.native.moe import PanelExperts
from penstock.kernels.packing import PackedExperts, PackedWeight


def take_expert(packed: PackedExperts, expert: int) -> tuple[Tensor, Tensor]:
    """(gate_up [2 F, K], down [K, F]) of one of the packed experts, bit for bit what was packed; copies."""
    _check("take_expert", packed, expert)
    gate_up, down = packed.gate_up, packed.down
    if gate_up is None or down is None:
        first, second = packed.per_expert[expert]
        return _plain(first), _plain(second)
    if isinstance(packed, PanelExperts):
        return (
            unpack_panels(gate_up[expert], 2 * packed.width, packed.num_inputs),
            unpack_panels(down[expert], packed.num_inputs, packed.width),
        )
    return gate_up[expert].clone(), down[expert].clone()


def put_expert(packed: PackedExperts, expert: int, fresh: PackedExperts) -> PackedExperts:
    """`packed` with its expert number `expert` replaced by the only one of `fresh`, from the same backend.

    Tensors are written in place, so that what was captured with their addresses goes on; nobody may be computing with
    them. Use what is returned.
    """
    _check("put_expert", packed, expert)
    alike = (packed.width, packed.num_inputs, type(packed), packed.gate_up is None)
    if fresh.num_experts != 1 or alike != (fresh.width, fresh.num_inputs, type(fresh), fresh.gate_up is None):
        raise KernelInputError("put_expert", "fresh", "is not one expert of the same sizes and packing")
    if packed.gate_up is None or packed.down is None or fresh.gate_up is None or fresh.down is None:
        pairs = (*packed.per_expert[:expert], fresh.per_expert[0], *packed.per_expert[expert + 1 :])
        return dataclasses.replace(packed, per_expert=pairs)
    packed.gate_up[expert].copy_(fresh.gate_up[0])
    packed.down[expert].copy_(fresh.down[0])
    return packed


def add_places(packed: PackedExperts, count: int) -> PackedExperts:
    """`packed` with `count` further experts whose weights are zero; in new tensors."""
    if packed.gate_up is None or packed.down is None:
        spare = tuple(packed.per_expert[:1]) * count
        return dataclasses.replace(packed, num_experts=packed.num_experts + count, per_expert=packed.per_expert + spare)
    gate_up, down = (
        torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) for tensor in (packed.gate_up, packed.down)
    )
    return dataclasses.replace(packed, num_experts=packed.num_experts + count, gate_up=gate_up, down=down)


def _check(op: str, packed: PackedExperts, expert: int) -> None:
    if not 0 <= expert < packed.num_experts:
        raise KernelInputError(op, "expert", f"{expert}; there are {packed.num_experts}")


def _plain(weight: PackedWeight) -> Tensor:
    dense: Tensor = weight.weight.to_dense() if weight.rearranged else weight.weight.clone()
    return dense
