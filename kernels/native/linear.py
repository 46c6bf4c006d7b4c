"""Matrix product on the CPU with weights packed into panels of 64 outputs; see `linear.cpp`.

Called through `kernels/ops.py`; knows only tensors. Legend: T tokens, K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.cpu import linear as cpu_linear
from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.library import function
from penstock.kernels.packing import PackedWeight

PANEL = 64


class PanelWeight(PackedWeight):
    """`weight` is flat, of panels, inner words of 4 bytes and 64 outputs; outputs beyond M are zero."""

    __slots__ = ()


def pack_weight(weight_MK: Tensor, bias: Tensor | None) -> PackedWeight:
    """See `ops.pack_weight`. An odd number of bfloat16 inputs has no whole words and is left to torch."""
    outputs, inputs = weight_MK.shape
    if not whole_words(inputs, weight_MK.dtype) or outputs == 0:
        return cpu_linear.pack_weight(weight_MK, bias)
    panels = torch.empty(panel_numbers(outputs, inputs), dtype=weight_MK.dtype)
    pack_panels(weight_MK, panels)
    return PanelWeight(panels, None if bias is None else bias.to(panels.dtype).contiguous(), outputs, inputs, True)


def whole_words(inputs: int, dtype: torch.dtype) -> bool:
    """Whether a row of so many inputs can be in panels."""
    return inputs > 0 and inputs * dtype.itemsize % 4 == 0


def panel_numbers(outputs: int, inputs: int) -> int:
    """How many numbers the panels of a weight [outputs, inputs] hold."""
    return -(-outputs // PANEL) * PANEL * inputs


def pack_panels(weight_MK: Tensor, panels: Tensor) -> None:
    """Fill `panels`, contiguous, with a weight whose rows are whole words."""
    source = weight_MK.contiguous()
    function("pack", source.dtype)(source.data_ptr(), panels.data_ptr(), *source.shape)


def unpack_panels(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs] that `pack_panels` put there; a copy."""
    word = 4 // panels.element_size()
    split = panels.view(-1, inputs // word, PANEL, word)
    return split.transpose(1, 2).reshape(-1, inputs)[:outputs].contiguous()


def linear(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """See `ops.linear`."""
    if not isinstance(packed, PanelWeight):
        return cpu_linear.linear(x_TK, packed)
    tokens, inputs = x_TK.shape
    if inputs != packed.num_inputs or x_TK.stride(1) != 1 or x_TK.dtype != packed.weight.dtype:
        x_TK = _usable(x_TK, packed)
    out = torch.empty(tokens, packed.num_outputs, dtype=x_TK.dtype)
    bias = 0 if packed.bias is None else packed.bias.data_ptr()
    function("linear", x_TK.dtype)(
        x_TK.data_ptr(),
        x_TK.stride(0),
        packed.weight.data_ptr(),
        bias,
        out.data_ptr(),
        tokens,
        inputs,
        packed.num_outputs,
    )
    return out


def _usable(x_TK: Tensor, packed: PackedWeight) -> Tensor:
    if x_TK.dtype != packed.weight.dtype:
        raise KernelInputError("linear", "x", f"{x_TK.dtype}; the weight is {packed.weight.dtype}")
    if x_TK.shape[1] != packed.num_inputs:
        raise KernelInputError("linear", "x", f"{x_TK.shape[1]} inputs; the weight has {packed.num_inputs}")
    return x_TK.contiguous()
