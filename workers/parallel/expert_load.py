"""What a mixture of experts was asked for: tokens per layer and expert, and which choices follow each other.

Called by `expert_parallel.py` on every rank, which hands in each layer's counts as the ranks exchanged them, so that
all ranks hold the same figures; read by the placement's planner. Knows no weights, ranks or clocks: age is counted in
steps. Plain numpy.

Invariants: counts of a step that did not end are forgotten, never half counted; figures decay by half every
`half_life_steps`, so that a placement follows what is asked now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import IntegrityError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MOST_TRACED_EXPERTS = 512  # a layer's transitions are a square of them


@dataclass(frozen=True, slots=True, eq=False)
class LoadSnapshot:
    """What a planner reads. `transitions` is empty ([0, E, E]) where none were traced."""

    tokens: F64  # [L, E] decayed tokens sent to each expert
    transitions: F64  # [L - 1, E, E] decayed weight of expert b in layer l + 1 after expert a in layer l
    steps: int  # that ended so far


class ExpertLoad:
    """Decayed counts of one model's expert layers."""

    def __init__(self, num_layers: int, num_experts: int, half_life_steps: float = 256.0) -> None:
        """`num_layers` counts layers with experts only."""
        if half_life_steps <= 0:
            raise IntegrityError(f"a half-life of {half_life_steps} steps")
        self._tokens: F64 = np.zeros((num_layers, num_experts))
        self._fresh: I64 = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._keep = 0.5 ** (1.0 / half_life_steps)
        self.steps = 0

    def observe(self, layer: int, counts_E: I64) -> None:
        """Add one exchange's counts, over all ranks, of a step under way."""
        self._fresh[layer] += counts_E

    def end_step(self) -> None:
        """The step's counts are final."""
        self._tokens *= self._keep
        self._tokens += self._fresh
        self._fresh[:] = 0
        self.steps += 1

    def drop_step(self) -> None:
        """Forget the step under way: it failed and will be run again."""
        self._fresh[:] = 0

    def tokens(self) -> F64:
        """A copy, [L, E]."""
        return self._tokens.copy()


class RouteTrace:
    """Which experts follow which from layer to layer, over this rank's tokens (ExFlow 2024, section 4).

    With several experts per token every pair counts, weighted by the product of its gates. Few tokens are enough (the
    paper's trace has some thousands), so at most `most_tokens` of every `every`-th step are looked at.
    """

    def __init__(self, num_layers: int, num_experts: int, every: int = 8, most_tokens: int = 32) -> None:
        layers = num_layers - 1 if num_experts <= MOST_TRACED_EXPERTS else 0
        self._weights: F64 = np.zeros((max(0, layers), num_experts, num_experts))
        self._every, self._most_tokens = every, most_tokens
        self._step = 0
        self._last: tuple[int, I64, F64] | None = None

    def wanted(self) -> bool:
        """Whether this step's choices are looked at; lets the caller save the copy from a device."""
        return len(self._weights) > 0 and self._step % self._every == 0

    @property
    def most_tokens(self) -> int:
        """Of one step; the first ones."""
        return self._most_tokens

    def observe(self, layer: int, ids_Tk: I64, gates_Tk: F64) -> None:
        """The same tokens in the same order in every layer of a step; an id of -1 is no expert."""
        last, self._last = self._last, (layer, ids_Tk, gates_Tk)
        if last is None or last[0] != layer - 1 or len(last[1]) != len(ids_Tk):
            return
        before, after = last[1][:, :, None], ids_Tk[:, None, :]
        real = np.broadcast_to((before >= 0) & (after >= 0), (len(ids_Tk), last[1].shape[1], ids_Tk.shape[1]))
        weight = last[2][:, :, None] * gates_Tk[:, None, :]
        pairs = (before * self._weights.shape[1] + after)[real]
        np.add.at(self._weights[layer - 1].reshape(-1), pairs, weight[real])

    def end_step(self) -> None:
        """The next step's tokens are others."""
        self._last = None
        self._step += 1

    def fade(self, keep: float) -> None:
        """Multiply all by `keep`, in 0 .. 1; called whenever the trace was used."""
        self._weights *= keep

    def transitions(self) -> F64:
        """A copy, [L - 1, E, E], or [0, E, E] where the model has too many experts to trace."""
        return self._weights.copy()


def skew(rank_load: F64) -> float:
    """The largest rank's load over the mean, of the worst layer of [L, R]; 1 is even. Layers without load are even."""
    means = rank_load.mean(axis=-1)
    busy = means > 0
    return float((rank_load.max(axis=-1)[busy] / means[busy]).max()) if busy.any() else 1.0
