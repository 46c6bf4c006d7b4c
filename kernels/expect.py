"""What the operations demand of their tensors, said once: each check raises a KernelInputError naming the argument.

Called by the wrappers of all backends before they touch memory. Reads shapes, dtypes, strides and devices, never
values: reading those would make a GPU wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import PackedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape(op: str, argument: str, tensor: Tensor, *sizes: int | None) -> None:
    """Demand exactly these sizes; None admits any."""
    pairs = zip(sizes, tensor.shape, strict=False)
    if tensor.dim() != len(sizes) or any(want is not None and want != have for want, have in pairs):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise KernelInputError(op, argument, f"shape {list(tensor.shape)}; expected [{wanted}]")


def dtype(op: str, argument: str, tensor: Tensor, *admitted: torch.dtype) -> None:
    """Demand one of these dtypes."""
    if tensor.dtype not in admitted:
        names = ", ".join(str(one).removeprefix("torch.") for one in admitted)
        raise KernelInputError(op, argument, f"dtype {str(tensor.dtype).removeprefix('torch.')}; expected {names}")


def device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    """Demand the device of `like`."""
    if tensor.device != like.device:
        raise KernelInputError(op, argument, f"on {tensor.device}; expected {like.device}")


def dense_rows(op: str, argument: str, tensor: Tensor) -> None:
    """Demand that neighbours in the last dimension are neighbours in memory; other strides are free."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelInputError(op, argument, f"strides {tensor.stride()}; the last must be 1")


def at_least(op: str, argument: str, value: int, least: int) -> None:
    """Demand a number not below `least`."""
    if value < least:
        raise KernelInputError(op, argument, f"{value}; expected {least} or more")


def product(op: str, x_TK: Tensor, packed: PackedWeight) -> Tensor:
    """Demand an input [T, K] that a packed weight [M, K] can be multiplied with; returns it. Written to be quick."""
    weight = packed.weight
    if x_TK.dim() != 2 or x_TK.shape[1] != packed.num_inputs:
        shape(op, "x", x_TK, None, packed.num_inputs)
    if x_TK.dtype != weight.dtype:
        dtype(op, "x", x_TK, weight.dtype)
    if x_TK.device != weight.device:
        device(op, "x", x_TK, weight)
    return x_TK


def weight(op: str, weight_MK: Tensor, bias: Tensor | None) -> Tensor:
    """Demand a weight [M, K] of floats and a bias [M] beside it, or None; returns the weight."""
    dtype(op, "weight", weight_MK, *FLOATS)
    shape(op, "weight", weight_MK, None, None)
    if bias is not None:
        shape(op, "bias", bias, weight_MK.shape[0])
        dtype(op, "bias", bias, *FLOATS)
        device(op, "bias", bias, weight_MK)
    return weight_MK
