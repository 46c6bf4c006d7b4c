"""One row of the benchmark: inputs, our call, the float64 truth, its cost, and what others offer for the same.

`rows_*.py` make them; `kernels.py` checks, times and reports them; `tune_kernels.py` times them under one
configuration after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .correctness import Bound, check, guard
from .sol import Cost

Inputs = dict[str, Tensor]
# Larger tensors are not copied for every run: they do not fit the cache, and nothing is keyed on their address.
MOST_CLONED_BYTES = 128 << 20
KINDS = ("normal", "large", "zeros")


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """`inputs` by name, those in `varying` new in every run; `truth` is float64, of what `select` takes."""

    inputs: Inputs
    varying: tuple[str, ...]
    call: Callable[[Inputs], object]
    truth: Callable[[Inputs], Tensor]
    bound: Callable[[Inputs], Bound]
    cost: Cost
    shape: tuple[int, ...]
    dtype: torch.dtype
    select: Callable[[Tensor], Tensor] = lambda result: result
    speedup: float = 1.0  # of the operands' matrix rate over bf16's
    kinds: tuple[str, ...] = KINDS
    peers: dict[str, Callable[[Inputs], object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def fresh(self, number: int, kind: str = "normal") -> Inputs:
        """The inputs of run `number`; the same for the same number."""
        found = {}
        for name, tensor in self.inputs.items():
            if name in self.varying:
                factor = {"normal": 1.0, "large": 64.0, "zeros": 0.0}[kind]
                found[name] = torch.roll(tensor, number, 0) * factor
            elif tensor.numel() * tensor.element_size() <= MOST_CLONED_BYTES:
                found[name] = tensor.clone()
            else:
                found[name] = tensor
        return found

    def check(self, result: object, number: int, kind: str = "normal") -> float:
        """The worst error over its bound. Raises RefusedError."""
        inputs = self.fresh(number, kind)
        whole = guard(result, self.shape, self.dtype)
        return check(self.select(whole).clone(), self.truth(inputs), self.bound(inputs), self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A named problem, made when its turn comes; `group` is what `--only` selects by."""

    name: str
    group: str
    make: Callable[[torch.device], Problem]
    kernel: str = ""  # what the tuning table calls it


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """A source of its own for every problem."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator(device, seed), device=device).to(dtype)
