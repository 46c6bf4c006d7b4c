"""Synthetic conversations and shared prefixes: the load that prefix caches and routers are judged by.

Used by `commands/bench.py`. Pure and seeded. A session's turns carry everything said before them, so turn j + 1 can
only be built once turn j has been answered; the plan says who follows whom, `runner.py` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from penstock.cluster.bench.workload import Piece, Planned

_PREFIX_CONTENT = 1 << 40  # apart from the block ids of traces


@dataclass(frozen=True, slots=True)
class SessionShape:
    """Turns of a conversation, and how long its user thinks between them (exponential)."""

    turns: int = 1
    think_s: float = 1.0


def with_shared_prefixes(plan: Sequence[Planned], groups: int, tokens: int, seed: int) -> list[Planned]:
    """Put one of `groups` system prompts of `tokens` tokens before every opening turn (Zipf 1.1 over the groups)."""
    if groups <= 0 or tokens <= 0:
        return list(plan)
    weights = 1.0 / np.arange(1, groups + 1) ** 1.1
    chosen = np.random.default_rng((seed, 3)).choice(groups, len(plan), p=weights / weights.sum())
    return [
        one
        if one.after is not None
        else replace(
            one,
            input_tokens=one.input_tokens + tokens,
            pieces=(Piece((_PREFIX_CONTENT + int(group),), tokens), *one.pieces),
        )
        for one, group in zip(plan, chosen, strict=True)
    ]


def with_turns(plan: Sequence[Planned], shape: SessionShape, seed: int) -> list[Planned]:
    """Let every request open a conversation of `turns` turns of its size."""
    rng = np.random.default_rng((seed, 4))
    turns: list[Planned] = []
    for opening in plan:
        turns.append(opening)
        for _ in range(1, shape.turns):
            think_s = float(rng.exponential(shape.think_s))
            following = Planned(opening.at_s, opening.input_tokens, opening.output_tokens, (), len(turns) - 1, think_s)
            turns.append(following)
    return turns
