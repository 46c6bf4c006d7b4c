"""Puts the linear layers of a transformers module into the order in which this machine multiplies fastest.

Called by `transformers_backend.py` around the probe: a layer that was called there and whose weight nobody else looked
at can be packed, and its plain weight is given up. All others stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from penstock.kernels import ops
from penstock.kernels.packing import PackedWeight


class WatchedLinear(nn.Module):
    """Stands for one linear layer and knows how it is used."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain
        self.called = False
        self.read = False  # somebody wants the weight itself

    @property
    def weight(self) -> Tensor:
        """The plain weight."""
        self.read = True
        weight: Tensor = self.plain.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The plain bias."""
        self.read = True
        bias: Tensor | None = self.plain.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """As the plain layer."""
        self.called = True
        y: Tensor = self.plain(x)
        return y


class PackedLinear(nn.Module):
    """A linear layer on a packed weight."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """y = x w^T + b, over the last dimension of x."""
        flat = ops.linear(x.reshape(-1, self._packed.num_inputs), self._packed)
        return flat.view(*x.shape[:-1], self._packed.num_outputs)


def watch_linears(model: nn.Module) -> None:
    """Put a `WatchedLinear` in the place of every linear layer. Subclasses are left alone: they may compute more."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D) and not isinstance(parent, WatchedLinear):
                setattr(parent, name, WatchedLinear(child))


def pack_linears(model: nn.Module) -> None:
    """Put packed layers in the place of the watched ones, or the plain ones back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, WatchedLinear):
                setattr(parent, name, _packed(child.plain) if child.called and not child.read else child.plain)


def _packed(plain: Any) -> PackedLinear:
    weight = plain.weight.t().contiguous() if isinstance(plain, Conv1D) else plain.weight
    bias = None if plain.bias is None else plain.bias.detach()
    return PackedLinear(ops.pack_weight(weight.detach(), bias))
